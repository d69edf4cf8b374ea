"""docs/performance.md says what the results files say."""

from load_tests.performance_tables import DOCUMENT, kernel_table, latest, quality_table, read_results, render, table

LINE = {
    "benchmark": "bench_x", "device": "d", "model": "m", "variant": "bf16", "workload": "one_stream",
    "metric": "output_tok_s", "value": 1234.5, "versions": {"torch": "2"}, "commit": "abc", "date": "2026-11-23T05:00Z",
}  # fmt: skip


def test_the_document_is_up_to_date():
    text = DOCUMENT.read_text()
    assert "<!-- table: bench_cpu -->" in text
    assert render(text, read_results()) == text, "run: python load_tests/performance_tables.py"


def test_the_latest_line_counts():
    assert latest([LINE, {**LINE, "value": 2.0}]) == [{**LINE, "value": 2.0}]


def test_a_row_a_workload_and_a_column_a_variant():
    other = {**LINE, "variant": "awq", "value": 7.125}
    alone = {**LINE, "workload": "mixed", "metric": "req_s", "value": 140.0}
    text = table("bench_x", [LINE, other, alone])
    assert "| workload | unit | bf16 | awq |" in text
    assert "| one_stream | output_tok_s | 1,234 | 7.12 |" in text
    assert "| mixed | req_s | 140.0 |  |" in text
    assert table("bench_y", [LINE]) == ""


def test_kernels_stand_beside_what_plain_ones_reach():
    common = {
        "benchmark": "bench_kernels", "device": "d", "kernel": "k", "shape": "64 rows", "versions": {"torch": "2"},
        "commit": "abc", "date": "2026-11-24T05:00Z", "ceilings": {"read_gb_s": 3000.0, "bf16_tflop_s": 800.0},
    }  # fmt: skip
    lines = [{**common, "metric": metric, "value": value} for metric, value in (("us", 12.5), ("gb_s", 2400.0))]
    text = kernel_table(lines)
    assert "Reading reaches 3,000 GB/s" in text and "8,192 800 TFLOP/s" in text
    assert "| k | 64 rows | 12.50 | 2,400 | 80% |  |  |" in text


def test_a_table_may_be_of_one_device():
    lines = [{**LINE, "device": "NVIDIA H100"}, {**LINE, "device": "EPYC, 2 cores"}]
    text = render("<!-- table: bench_x on H100 -->\n<!-- end -->\n", lines)
    assert "m on NVIDIA H100" in text and "EPYC" not in text


def test_quality_has_a_row_a_variant_with_its_memory():
    line = {**LINE, "benchmark": "bench_quality", "variant": "awq-4", "workload": "both", "settings": {"tokens": "all"}}
    values = {"average_bits": 4.375, "weights_mib": 141.4, "loss_percent": 16.0}
    lines = [{**line, "metric": metric, "value": value} for metric, value in values.items()]
    code = {**line, "workload": "code", "metric": "loss_percent", "value": 15.5}
    text = quality_table([*lines, code, {**lines[0], "variant": "rtn-8", "value": 8.25}])
    assert "m on d, all of both texts; 2026-11-23" in text
    assert "| awq-4 | 4.38 | 141.4 |  | 16.00 |  | 15.50 |  |  |" in text
    assert "| rtn-8 | 8.25 |  |" in text
    assert "about 8,192 tokens of each text" in quality_table([{**lines[0], "settings": {"tokens": 8192}}])
