"""Shares, orders, files and refusals, without processes."""

import pytest
import tiny_sarm
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from sarm.errors import InputError
from sarm.training.distributed import World
from sarm.training.distributed.extraction import SharedStateStream, equal_parts
from sarm.training.distributed.files import load_shards, save_sharded
from sarm.training.distributed.pairs import FilledPairs, PairOrder, collate_filled, counted
from sarm.training.distributed.world import (
    launched,
    leaving_group,
    naming_lost_ranks,
    share,
    timeout_s,
)


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 9))
def test_parts_are_whole_in_order_and_nearly_equal(costs, ranks):
    parts = equal_parts(costs, ranks)
    assert [c for part in parts for c in costs[part]] == costs
    heaviest = max((sum(costs[part]) for part in parts), default=0)
    assert heaviest <= sum(costs) / ranks + 2 * max(costs, default=0)


@pytest.mark.parametrize("rank", [0, 1])
def test_only_rank_0_deletes_pieces(rank, tmp_path):
    """Two that list and delete one folder get in each other's way."""

    class Rank(World):
        @property
        def main(self):
            return rank == 0

    stream = SharedStateStream(None, None, tmp_path / "states", 1, world=Rank())
    for place in ("000000000", "000000007"):
        (tmp_path / "states" / place).mkdir(parents=True)
    stream._keep_only(7)
    assert (tmp_path / "states" / "000000007").exists()
    assert (tmp_path / "states" / "000000000").exists() is (rank != 0)
    stream._remove(tmp_path / "states" / "000000007")
    assert (tmp_path / "states" / "000000007").exists() is (rank != 0)
    stream._keep_only(None)
    assert (tmp_path / "states").exists() is (rank != 0)


@given(st.integers(0, 100), st.integers(1, 9))
def test_shares_are_whole_and_differ_by_one(count, ranks):
    shares = [share(count, rank, ranks) for rank in range(ranks)]
    assert [i for s in shares for i in range(count)[s]] == list(range(count))
    sizes = [s.stop - s.start for s in shares]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("block", [1, 4, 8, 24])
def test_an_order_is_the_same_for_any_number_of_processes(block):
    epoch = [0]
    order = PairOrder(22, block, 5, lambda: epoch[0])
    first = list(order)
    assert len(first) == len(order) == -(-22 // block) * block
    assert first[:22] == list(PairOrder(22, 1, 5, lambda: 0))
    assert sorted(first[:22]) == list(range(22))
    epoch[0] = 1
    assert list(order)[:22] != first[:22]


def test_fillers_count_nothing():
    from sarm.data import Record, to_pair
    from sarm.tokens import ConversationEncoder
    from sarm.training.collate import PairDataset

    rows = [to_pair(Record(f"f:{i}", row)) for i, row in enumerate(tiny_sarm.make_pairs(3))]
    data = FilledPairs(PairDataset(rows, ConversationEncoder(tiny_sarm.make_tokenizer(), 99), 999))
    mixed = collate_filled([data[1], data[3], data[2]])
    assert (counted(mixed), len(mixed["margins"])) == (2, 2)
    empty = collate_filled([data[3], data[4]])
    assert (counted(empty), len(empty["margins"])) == (0, 1)


def test_a_streamed_file_is_a_safetensors_file(tmp_path):
    tensors = {
        "sae/decoder.weight": torch.randn(6, 4).t(),
        "optimizer/encoder.weight/exp_avg": torch.randn(4, 6).to(torch.bfloat16),
        "last": torch.arange(4),
        "optimizer/pre_bias/step": torch.tensor(7.0),
        "empty": torch.zeros(0, 3),
        "codes": torch.arange(5, dtype=torch.uint8),
    }
    path = tmp_path / "all.safetensors"
    save_sharded(path, tensors, lambda name: None, {"record": '{"é": 1}'}, World())
    for read in (load_file(path), load_shards(path, lambda name: None, World())):
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[n], t) and read[n].dtype == t.dtype for n, t in tensors.items())


def test_refusals_are_one_line(monkeypatch):
    monkeypatch.setenv("SARM_TIMEOUT_S", "soon")
    with pytest.raises(InputError, match=r"SARM_TIMEOUT_S must be a whole number .* got 'soon'"):
        timeout_s()
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "2")
    assert launched() == (2, 4)
    with pytest.raises(InputError, match="divide the number of processes, which is 4, got 3"):
        World.joined(3).__enter__()


def test_a_lost_process_is_named_and_other_errors_pass(monkeypatch):
    monkeypatch.setenv("SARM_TIMEOUT_S", "30")
    lost = r"rank 0 of 1: another process .* 30 s .*by peer"
    with pytest.raises(ConnectionError, match=lost), naming_lost_ranks():
        raise RuntimeError("[gloo/pair.cc:534] Connection closed by peer [127.0.0.1]:1")
    with pytest.raises(RuntimeError, match="shapes"), naming_lost_ranks():
        raise RuntimeError("shapes cannot be multiplied")


def test_a_group_is_left_by_who_began_it(tmp_path):
    def begin():
        store = dist.FileStore(str(tmp_path / "store"), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)

    def fail():
        with leaving_group():
            begin()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not dist.is_initialized()
    begin()
    with leaving_group():
        pass
    assert dist.is_initialized()
    dist.destroy_process_group()
