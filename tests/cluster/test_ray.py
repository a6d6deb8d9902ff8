"""A Ray cluster of two nodes on one machine: two raylets, of which one is killed in the middle of its cell."""

import pytest
from ray.cluster_utils import Cluster

from erasekit.errors import EnvironmentProblem
from erasekit.registration import plugins
from erasekit.sweeps.sweep import How, sweep
from tests.sweeping import BOTH, FILES, IMAGES, counted, grid_of, lines_of, numbers


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """(the cluster, its two nodes that work); what is set before it begins reaches its workers."""
    monkeypatch.setenv("COUNTS", str(tmp_path / "counts.jsonl"))
    store = {"object_store_memory": 80_000_000}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **store})
    nodes = [made.add_node(num_cpus=1, **store) for _ in range(2)]
    made.wait_for_nodes()
    yield made, nodes
    made.shutdown()


def test_a_lost_nodes_cell_goes_on_elsewhere(cluster, tiny_folder, tmp_path):
    made, nodes = cluster
    registries, file = plugins.load(FILES), tmp_path / "counts.jsonl"
    grid = grid_of(tiny_folder, on={"counted": {"options": {"method": {"pause": 0.2}}}})
    how = How(launcher="ray", settings={"address": made.address}, plugins=FILES)
    at_work, lost = [], []

    def watch(cells):
        begun = [state.stage for _, state in cells if state.state == "begun"]
        at_work.append(len(begun))
        if not lost and len(begun) == 2 and all(stage.startswith("steps") for stage in begun):
            made.remove_node(nodes[0], allow_graceful=False)
            lost.append(nodes[0])

    swept = sweep(grid, registries, name="ray", out=tmp_path / "runs", how=how, watch=watch)
    assert max(at_work) == 2
    assert lost
    assert not swept.failed
    assert counted(lines_of(file))[:2] == (BOTH, IMAGES)
    alone = sweep(grid, registries, name="alone", out=tmp_path / "alone", how=How(launcher="in-process", plugins=FILES))
    assert numbers(swept) == numbers(alone)


def test_no_cluster_at_an_address_is_one_line(tiny_folder, tmp_path):
    how = How(launcher="ray", settings={"address": "127.0.0.1:1"}, plugins=FILES)
    with pytest.raises(EnvironmentProblem, match=r"^There is no Ray cluster at '127\.0\.0\.1:1'[^\n]*$"):
        sweep(grid_of(tiny_folder), plugins.load(FILES), name="none", out=tmp_path, how=how)
