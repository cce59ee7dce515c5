"""KernelOperator on the device of tests/gpu/mock_cuda.py: tensors of two devices that meet are errors, as on a GPU."""

import json

import pytest
from test_cuda_device import in_mock

pytestmark = pytest.mark.slow

SCRIPT = """
import json, sys, mock_cuda, torch
mock_cuda.install()
from approxkmv import KernelOperator

dtype = getattr(torch, sys.argv[1])
q, k = (torch.randn(n, 8, generator=torch.Generator().manual_seed(n), dtype=dtype) for n in (1000, 1200))
x = torch.stack([torch.ones_like(k[:, 0]), k[:, 0]], 1)
truth = (-torch.cdist(q.double(), k.double()).square() / 8).exp() @ x.double()
K = KernelOperator(q.to("cuda"), k.to("cuda"), 2.0, float(sys.argv[2]), method=sys.argv[3], seed=0)
y = K @ x.to("cuda")
A = K.as_linear_operator()
u, v = y[:, 0].cpu().numpy(), x[:, 1].numpy()
print(json.dumps({
    "device": y.device.type,
    "dtype": str(y.dtype)[6:],
    "method": K.last.method,
    "exponents": K.last.exponents,
    "error": float((y.cpu().double() - truth).norm() / truth.norm()),
    "transposed": float(u @ (A @ v)) / float((A.T @ u) @ v),
}))
"""


@pytest.mark.parametrize(
    ("dtype", "epsilon", "method", "exponents", "limit"),
    [
        ("float32", 0.05, "blocks", "bfloat16", 0.05),
        ("float32", 0.05, "exact", "bfloat16", 0.01),
        ("float64", 0.05, "blocks", "bfloat16", 0.05),
        ("float64", 1e-6, "exact", "float64", 1e-12),
    ],
)
def test_products_on_a_device(tmp_path, dtype, epsilon, method, exponents, limit):
    script = tmp_path / "product.py"
    script.write_text(SCRIPT)
    done = in_mock(script, dtype, epsilon, method)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["device"], found["dtype"], found["method"], found["exponents"]) == ("cuda", dtype, method, exponents)
    assert found["error"] < limit
    assert abs(found["transposed"] - 1) < 1e-5
