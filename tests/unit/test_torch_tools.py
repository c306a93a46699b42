"""Weight files, placement and data items: strict, safe, and the same in every process."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from corun import torch_tools
from corun.errors import InputError
from corun.registry import ModelOptions


def network() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))


def saved(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "params"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_state_dicts_are_unwrapped(wrapper: str | None, prefix: str, tmp_path: Path) -> None:
    """A plain state dict, one under a usual key, and one saved by DistributedDataParallel read the same."""
    state = network().state_dict(prefix=prefix)
    path = saved({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "w.pth")
    fresh = network()
    torch_tools.load_strict(fresh, torch_tools.read_state_dict(path), path)
    assert torch.equal(fresh[0].weight, state[f"{prefix}0.weight"])


def test_safetensors_are_read(tmp_path: Path) -> None:
    """A .safetensors file, which has no version marks, loads as the current layout."""
    state = network().state_dict()
    save_file(dict(state), tmp_path / "w.safetensors")
    fresh = network()
    torch_tools.load_strict(fresh, torch_tools.read_state_dict(tmp_path / "w.safetensors"), "w")
    assert torch.equal(fresh[0].bias, state["0.bias"])


def test_layouts_older_than_the_network_are_converted(tmp_path: Path) -> None:
    """BatchNorm files from before num_batches_tracked load, as torch's own loader allows."""
    state = OrderedDict((k, v) for k, v in network().state_dict().items() if "tracked" not in k)
    state._metadata = {"": {}, "0": {}, "1": {}}
    path = saved(state, tmp_path / "old.pth")
    torch_tools.load_strict(network(), torch_tools.read_state_dict(path), path)


def test_files_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    """Missing, damaged, empty and non-tensor files, and pickles of code, are input errors naming the file."""
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "cut.pth").write_bytes(saved(network().state_dict(), tmp_path / "w.pth").read_bytes()[:300])
    saved({"a": 1}, tmp_path / "numbers.pth")
    saved({}, tmp_path / "empty.pth")
    saved([1, 2], tmp_path / "list.pth")
    saved(network(), tmp_path / "code.pth")
    for name in (
        "none.pth",
        "text.pth",
        "text.safetensors",
        "cut.pth",
        "numbers.pth",
        "empty.pth",
        "list.pth",
        "code.pth",
    ):
        with pytest.raises(InputError, match=name):
            torch_tools.read_state_dict(tmp_path / name)


def test_misfits_are_listed_and_cut_short() -> None:
    """Shapes, missing and unknown names are listed, six at most and a count of the rest."""
    state = {"0.weight": torch.zeros(1), **{f"x{i}": torch.zeros(1) for i in range(9)}}
    with pytest.raises(InputError) as caught:
        torch_tools.load_strict(network(), state, "w.pth")
    problems = caught.value.problems
    assert problems[0] == "shape of 0.weight: (1,) in the file, (4, 3, 3, 3) in the network"
    assert len(problems) == 7
    assert problems[-1].startswith("... and ")


def test_the_label_is_the_files_hash(tmp_path: Path) -> None:
    """The label begins with the first 12 hex digits of the file's SHA-256 and ends with the path."""
    path = tmp_path / "w.pth"
    path.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()[:12]
    assert torch_tools.sha256_label(path) == f"sha256:{digest} {path}"


def test_seeding_is_local() -> None:
    """Building under a seed gives equal networks and leaves the process's generator where it was."""
    before = torch.get_rng_state()
    weights = []
    for _ in range(2):
        with torch_tools.seeded(4):
            weights.append(network()[0].weight)
    assert torch.equal(*weights)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_a_host_batch_is_the_stacked_arrays(dtype: type) -> None:
    """Arrays become one tensor of their type, in order."""
    arrays = [np.full((3, 4, 5), value, dtype) for value in (1, 2)]
    batch = torch_tools.host_batch(arrays, torch.device("cpu"))
    assert np.array_equal(batch.numpy(), np.stack(arrays))
    assert batch.numpy().dtype == dtype


def test_serving_freezes_and_training_does_not() -> None:
    """A served network is in eval mode without gradients; a trained one in train mode with float32 weights."""
    served = torch_tools.place_for_serving(network(), ModelOptions(precision="bf16", channels_last=True))
    trained = torch_tools.place_for_training(network(), ModelOptions(precision="bf16"))
    assert not served.training
    assert served[0].weight.dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in served.parameters())
    assert trained.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in trained.parameters())


def test_detection_targets_stay_a_list() -> None:
    """Images are stacked and targets with different numbers of boxes are kept apart."""
    items = [(torch.zeros(3, 4, 4), {"boxes": torch.zeros(n, 4)}) for n in (0, 2)]
    pictures, targets = torch_tools.collate_detection(items)
    assert pictures.shape == (2, 3, 4, 4)
    assert [len(target["boxes"]) for target in targets] == [0, 2]


def test_threads_of_one_process_compute_with_their_own_number() -> None:
    """A thread keeps the number it asked for although another, later, asks for another one before it computes."""
    first, second = threading.Event(), threading.Event()
    seen: dict[str, int] = {}

    def service() -> None:
        torch_tools.compute_with(1)
        first.set()
        assert second.wait(30)
        seen["service"] = torch.get_num_threads()

    def trainer() -> None:
        assert first.wait(30)
        torch_tools.compute_with(2)
        second.set()
        seen["trainer"] = torch.get_num_threads()

    before = torch.get_num_threads()
    threads = [threading.Thread(target=work) for work in (service, trainer)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.set_num_threads(before)
    assert seen == {"service": 1, "trainer": 2}


@pytest.mark.parametrize(
    ("names", "device"),
    [
        (["auto", "cuda", "cuda:0"], "cuda:0"),
        (["cuda:1", "cuda:1"], "cuda:1"),
        (["cuda", "cuda:1"], None),
        (["cuda", "cpu"], None),
        ([], None),
    ],
)
def test_streams_belong_to_one_device(names: list[str], device: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Different spellings of one CUDA device are one; two devices, a CPU among them, or none are refused."""
    monkeypatch.setattr(torch_tools, "resolve_device", lambda name: "cuda" if name == "auto" else name)
    if device is None:
        with pytest.raises(InputError, match="one CUDA device"):
            torch_tools.one_cuda_device(names)
    else:
        assert torch_tools.one_cuda_device(names) == (torch, device)
