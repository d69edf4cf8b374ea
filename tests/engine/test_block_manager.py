import pytest

from trident_llm.engine.block_manager import BlockCopy, BlockManager

from .helpers import make_sequence


def admit(manager: BlockManager, seq) -> int:
    matched = manager.match_prefix(seq)
    manager.admit(seq, matched, len(seq.token_ids))
    hit = seq.num_computed
    seq.num_computed = len(seq.token_ids)
    manager.register(seq)
    return hit


def test_blocks_are_taken_and_given_back():
    manager = BlockManager(4, 4, prefix_caching=False)
    seq = make_sequence([1] * 9)
    assert admit(manager, seq) == 0
    assert len(seq.block_table) == 3 and manager.num_free == 1
    manager.check_integrity([seq])
    manager.free(seq)
    assert manager.num_free == 4 and manager.num_cached == 0
    manager.check_integrity([])


def test_full_blocks_are_shared_and_the_last_token_is_always_computed():
    manager = BlockManager(8, 4, prefix_caching=True)
    first = make_sequence(list(range(12)))
    admit(manager, first)
    same = make_sequence(list(range(12)))
    assert admit(manager, same) == 8
    assert same.block_table[:2] == first.block_table[:2] and same.block_table[2] != first.block_table[2]
    longer = make_sequence([*range(12), 99])
    assert admit(manager, longer) == 12
    manager.check_integrity([first, same, longer])


def test_a_block_is_found_only_behind_the_same_beginning_and_salt():
    manager = BlockManager(8, 4, prefix_caching=True)
    admit(manager, make_sequence([1, 2, 3, 4, 5, 6, 7, 8, 9]))
    assert manager.match_prefix(make_sequence([0, 2, 3, 4, 5, 6, 7, 8, 9])).blocks == []
    assert manager.match_prefix(make_sequence([1, 2, 3, 4, 5, 6, 7, 8, 9], salt=b"tenant")).blocks == []
    assert len(manager.match_prefix(make_sequence([1, 2, 3, 4, 0, 0, 0, 0, 0]))) == 1


def test_cached_blocks_survive_their_sequence_until_the_oldest_is_needed():
    manager = BlockManager(4, 4, prefix_caching=True)
    old, new = make_sequence([1] * 5), make_sequence([2] * 5)
    for seq in (old, new):
        admit(manager, seq)
        manager.free(seq)
    assert manager.num_free == 4 and manager.num_cached == 2
    big = make_sequence([3] * 12)
    admit(manager, big)
    assert manager.match_prefix(make_sequence([1] * 5)).blocks == []
    assert len(manager.match_prefix(make_sequence([2] * 5))) == 1
    manager.check_integrity([big])


def test_missing_blocks_count_cached_blocks_that_must_be_revived():
    manager = BlockManager(4, 4, prefix_caching=True)
    seq = make_sequence([1] * 9)
    admit(manager, seq)
    manager.free(seq)
    again = make_sequence([1] * 9)
    matched = manager.match_prefix(again)
    assert len(matched) == 2 and manager.blocks_missing(matched, 9) == 3


def test_forks_share_until_one_writes():
    manager = BlockManager(6, 4, prefix_caching=True)
    parent = make_sequence([1, 2, 3, 4, 5, 6])
    admit(manager, parent)
    child = make_sequence([1, 2, 3, 4, 5, 6])
    manager.fork(parent, child)
    assert child.block_table == parent.block_table and child.num_computed == 6
    shared = parent.block_table[1]
    assert manager.blocks_to_grow(parent, 1) == 1
    copy = manager.grow(parent, 1)
    assert copy == (BlockCopy(shared, parent.block_table[1]),) and child.block_table[1] == shared
    assert manager.blocks_to_grow(child, 1) == 0 and manager.grow(child, 1) == ()
    manager.check_integrity([parent, child])
    manager.free(parent)
    manager.free(child)
    assert manager.num_free == 6


def test_integrity_check_notices_a_lost_block():
    manager = BlockManager(4, 4, prefix_caching=True)
    seq = make_sequence([1] * 5)
    admit(manager, seq)
    with pytest.raises(AssertionError):
        manager.check_integrity([])
