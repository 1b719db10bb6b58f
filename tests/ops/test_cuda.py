"""The CUDA source compiles clean everywhere; where a device is, it agrees with the native CPU kernel."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastalign.ops import _cpp

CSRC = Path(__file__).resolve().parents[2] / "csrc"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
@pytest.mark.parametrize("source", sorted((CSRC / "cuda").glob("*.cu")), ids=lambda path: path.name)
def test_no_warnings_and_no_spills(source, tmp_path):
    archs = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in (80, 90)]
    flags = ["-std=c++17", "-O3", f"-I{CSRC}", "-Werror=all-warnings", "-Xptxas=-v", "-t2", *archs]
    command = ["nvcc", *flags, "-c", str(source), "-o", str(tmp_path / "kernels.o")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    spills = re.findall(r"(\d+) bytes spill", run.stderr + run.stdout)
    assert len(spills) >= 2 * 2 * 8, "two figures per architecture for four dtypes, with and without softcap"
    assert set(spills) == {"0"}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("num_labels", [1, 7, 507, 32000, 32001])
@pytest.mark.parametrize("softcap", [None, 10.0])
def test_agrees_with_the_cpu(dtype, num_labels, softcap):
    from fastalign import _C

    if not _C.has_cuda:
        pytest.skip("fastalign._C was built without nvcc")
    generator = torch.Generator().manual_seed(num_labels)
    logits = (4 * torch.randn(9, num_labels, generator=generator)).to(dtype)
    labels = torch.randint(0, num_labels, (9,), generator=generator)
    labels[:4] = torch.tensor([-100, -1, num_labels, -100])
    logits[0] = torch.nan
    expected = _cpp.forward(logits, labels, temperature=0.7, softcap=softcap, entropy=True)
    outputs = [torch.full((9,), torch.nan, dtype=expected[0].dtype, device="cuda") for _ in range(4)]
    on_device, labels_on_device = logits.cuda(), labels.cuda()
    op = _C.TokenLogps(
        logits=(on_device.data_ptr(), on_device.stride(0), on_device.stride(1)),
        dtype=_cpp.DTYPES[dtype],
        rows=9,
        vocabulary=num_labels,
        labels=labels_on_device.data_ptr(),
        labels_are_int64=True,
        temperature=0.7,
        softcap=softcap or 0.0,
        **{name: x.data_ptr() for name, x in zip(("logps", "entropy", "max", "logsum"), outputs, strict=True)},
    )
    op.forward_cuda(torch.cuda.current_stream().cuda_stream)
    for mine, theirs in zip(outputs, expected[:4], strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, atol=2e-5, rtol=1e-5, equal_nan=True)
