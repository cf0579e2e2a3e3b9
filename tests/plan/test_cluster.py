"""Descriptions of clusters: quantities, links, bad input in words, and this machine."""

from __future__ import annotations

import doctest
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightning_bharat.plan import cluster as room
from lightning_bharat.plan.cluster import EXAMPLE, Cluster, ClusterError, Host, Link, number
from lightning_bharat.plan.layout import LayoutError

PLAIN = (
    "nodes: 1\ndevices_per_node: 2\nmemory: 80 GB\nflops: 1 TFLOP/s\nintra_node: {bandwidth: 1 GB/s, latency: 0 s}\n"
)


def read(folder: Path, text: str) -> Cluster:
    file = folder / "cluster.yaml"
    file.write_text(text, encoding="utf-8")
    return Cluster.read(file)


def test_docstrings_are_true() -> None:
    assert doctest.testmod(room).failed == 0


def test_the_example_is_read(tmp_path: Path) -> None:
    assert read(tmp_path, EXAMPLE) == Cluster(
        nodes=4,
        devices_per_node=8,
        memory=80_000_000_000,
        flops=312e12,
        intra_node=Link(300e9, 5 * 1e-6),
        inter_node=Link(100e9, 10 * 1e-6),
        host=Host(10**12, 25e9),
        efficiency=0.5,
        usable=0.9,
    )
    assert read(tmp_path, EXAMPLE).devices == 32
    assert read(tmp_path, EXAMPLE).room == 72_000_000_000


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("80GiB", "bytes", 80 * 2**30),
        ("1.5e3 kB", "bytes", 1.5e6),
        ("100 Mbit/s", "bytes/s", 12.5e6),
        ("989 TFLOPS", "FLOP/s", 989e12),
        ("1 PFLOP/s", "FLOP/s", 1e15),
        ("10 µs", "s", 1e-5),
        (7, "bytes", 7.0),
    ],
)
def test_quantities(text: object, kind: str, value: float) -> None:
    assert number(text, kind) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("memory: 80 GB/s", "memory='80 GB/s': write a number and a unit, such as '80 GB'"),
        ("memory: 80 hectares", "memory='80 hectares'"),
        ("memory: -80 GB", "memory='-80 GB'"),
        ("memory: 0", "memory=0: write a number above 0"),
        ("memory: []", "memory=\\[\\]: write the memory of a device"),
        ("nodes: 0", "nodes=0: write a number above 0"),
        ("nodes: 1.5", "nodes=1.5: write a whole number"),
        ("nodes: true", "nodes=True: write a whole number"),
        ("nodes: 2", "2 nodes have no link between them; write inter_node"),
        ("flops: fast", "flops='fast'"),
        ("efficiency: 1.5", "efficiency=1.5: write a share above 0, up to 1"),
        ("usable: 90 %", "usable='90 %': write a share such as 0.5"),
        ("overlap: 1", "overlap=1: write true or false"),
        ("gpus: 8", "'gpus' is not known; write some of nodes, devices_per_node"),
        ("intra_node: 300 GB/s", "intra_node='300 GB/s': write {bandwidth: ..., latency: ...}"),
        ("intra_node: {bandwidth: 1 GB/s}", "intra_node: latency is missing"),
        ("intra_node: {bandwidth: 1 GB/s, latency: 1 m}", "intra_node: latency='1 m'"),
        ("intra_node: {bandwidth: 0, latency: 0}", "intra_node: a bandwidth is above 0"),
        ("host: {memory: 1 TB, bandwidth: 1 GB/s, cores: 8}", "host: 'cores' is not known"),
        ("memory: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("memory: [80 GB", "cluster .*cluster.yaml: while parsing"),
    ],
)
def test_bad_descriptions_are_refused_in_words(tmp_path: Path, change: str, words: str) -> None:
    name = change.partition(":")[0]
    kept = [line for line in PLAIN.splitlines() if not line.startswith(f"{name}:")]
    with pytest.raises(ClusterError, match=words):
        read(tmp_path, "\n".join([*kept, change]))


@pytest.mark.parametrize("name", ["nodes", "devices_per_node", "memory", "flops", "intra_node"])
def test_what_is_missing_is_named(tmp_path: Path, name: str) -> None:
    kept = [line for line in PLAIN.splitlines() if not line.startswith(f"{name}:")]
    with pytest.raises(LayoutError, match=f"{name} is missing"):
        read(tmp_path, "\n".join(kept))


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="write names and values"):
        read(tmp_path, "- 1\n")
    with pytest.raises(ClusterError, match="No such file"):
        Cluster.read(tmp_path / "nowhere.yaml")


def test_the_smallest_memory_counts_and_it_is_said(tmp_path: Path) -> None:
    found = read(tmp_path, PLAIN.replace("80 GB", "[80 GB, 40 GB]"))
    assert found.memory == 40e9
    assert found.notes == ("Devices differ in memory, and ranks hold alike: planned for the smallest, 40 GB.",)
    assert read(tmp_path, PLAIN.replace("80 GB", "[80 GB, 80 GB]")).notes == ()


def test_one_device_needs_no_link(tmp_path: Path) -> None:
    alone = "nodes: 1\ndevices_per_node: 1\nmemory: 1 GB\nflops: 1 TFLOP/s\n"
    assert read(tmp_path, alone).devices == 1


def test_links_are_those_of_the_slowest_hop() -> None:
    two = Cluster(2, 4, 1, 1.0, Link(10.0, 1.0), Link(8.0, 3.0))
    assert two.link(4, 1) == Link(10.0, 1.0)  # four neighbours: inside a node
    assert two.link(2, 2) == Link(10.0, 1.0)
    assert two.link(8, 1) == Link(8.0, 3.0)  # one ring over both nodes has each node's link for itself
    assert two.link(4, 2) == Link(4.0, 3.0)  # two such rings share it
    assert two.link(2, 4) == Link(2.0, 3.0)  # four pairs share it
    assert replace(two, intra_node=Link(1.0, 1.0)).link(8, 1) == Link(1.0, 3.0)


def test_all_to_all_takes_what_leaves_the_node() -> None:
    two = Cluster(2, 4, 1, 1.0, Link(10.0, 1.0), Link(8.0, 3.0))
    assert two.all_to_all(1, 1, 40.0) == 0
    assert two.all_to_all(4, 1, 40.0, messages=2) == 2 * 1 + 3 * 10 / 10  # to three others of the node
    assert two.all_to_all(8, 1, 80.0) == 3 + 4 * 10 / (8 / 4)  # to four behind the link of four devices
    assert two.all_to_all(2, 4, 80.0) == 3 + 40 / (8 / 4)
    assert replace(two, intra_node=Link(1.0, 1.0)).all_to_all(8, 1, 80.0) == 3 + 3 * 10 / 1


def test_this_machine_is_one_node() -> None:
    found = Cluster.detect()
    assert found.nodes == 1 and found.devices >= 1 and found.host is None
    assert found.overlap == torch.cuda.is_available()
    assert found.memory > 2**20 and found.flops > 1e6 and found.intra_node.bandwidth > 1e6
    assert any("FLOP/s" in note for note in found.notes)
