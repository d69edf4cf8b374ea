"""What doors read from their models' configuration."""

from __future__ import annotations

import pytest

from trident_llm.config import EngineConfig
from trident_llm.errors import BadRequest
from trident_llm.server.model_config import check_capacity, engine_launch, parameters_of

ITERATIVE = {"sequence_batching": {}, "instance_group": [{"count": 2}, {"count": 1}], "max_batch_size": 8}


def test_parameters_of_the_server_itself_are_left_out():
    config = {"parameters": {"model": {"string_value": "m"}, "EXECUTION_ENV_PATH": {"string_value": "env.tar.gz"}}}
    assert parameters_of(config) == {"model": "m"}
    assert parameters_of({}) == {}


def test_capacity_must_hold_every_request_the_engine_accepts():
    check_capacity(ITERATIVE, EngineConfig(model="m", max_num_seqs=4, max_queue_size=20))
    engine = EngineConfig(model="m", max_num_seqs=4, max_queue_size=21)
    with pytest.raises(BadRequest, match=r"3 \* 8 = 24 is less than max_num_seqs \+ max_queue_size \(4 \+ 21 = 25\)"):
        check_capacity(ITERATIVE, engine)
    check_capacity({"max_batch_size": 0}, engine)


def test_engine_runs_in_the_python_of_the_door():
    launch = engine_launch({"model": "m"})
    assert launch.parameters == {"model": "m"}
    assert launch.command[1:] == ["-m", "trident_llm.engine.process"]
