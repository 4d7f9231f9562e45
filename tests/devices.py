"""All scripts as if they ran on a GPU, on a machine without one, by hand:

    python tests/devices.py [script ...]

Numbers are computed on the CPU; a label says which tensors would lie on the GPU. Every operation,
those of backward() and of optimisers too, is checked as CUDA would: tensors of two devices in one
operation are an error, and so are a generator of the other device, a CUDA tensor given to NumPy,
and one in a file, which no machine without a GPU could load. It knows nothing of CUDA's kernels,
memory, streams and compilation, and replaces no run on a card. About a minute. (A file
tests/cuda.py would hide the package cuda that PyTorch looks for.)
"""
import contextlib
import importlib
import io
import itertools
import os
import pathlib
import sys
import tempfile
import time
import traceback

import torch
from matplotlib.figure import Figure
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import common  # noqa: E402

SCRIPTS = {  # flags that shorten the smoke preset
    "ae_cube": "--steps 2 --points 300 --held-out 200",
    "lso_mnist": "--train-steps 2 --steps 3",
    "vae_lj_fluid": "--configurations 20 --sweeps 4 --epochs 1",
    "frozen_encoder_vae": "--train-images 256 --test-images 100 --epochs 1",
    "eae_simmering": "--experiment mnist celeba reaction-diffusion --seeds 1 --updates 2"}
labelled = {}  # {a storage's address: a weak reference, so that no other storage gets it}
plain_save, plain_to = torch.save, torch.Tensor.to


def address(t):
    while is_functorch_wrapped_tensor(t):  # inside vmap
        t = get_unwrapped(t)
    return t.untyped_storage()._cdata


def on_cuda(t):
    return address(t) in labelled


def label(t, cuda):
    if cuda:
        labelled[address(t)] = StorageWeakRef(t.untyped_storage())
    else:
        labelled.pop(address(t), None)


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Generator(torch.Generator):
    """A CPU generator that says it is of another device."""

    def __new__(cls, device="cpu"):
        self = super().__new__(cls)
        self.told = torch.device(device)
        return self

    device = property(lambda self: self.told)


class Operations(TorchDispatchMode):
    """Below autograd, each operation: its tensors must share a device, which its result gets."""
    wanted = "cpu"  # of what has no tensor to go by, such as torch.zeros(3)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        inputs, name = tensors((args, kwargs)), operation._schema.name
        cuda = any(on_cuda(t) for t in inputs)
        free = []  # what CUDA takes from the CPU: indices
        if name.startswith("aten::index") and on_cuda(args[0]):
            free = [id(t) for t in tensors(args[1])]
        for t in inputs:
            number = t.dim() == 0
            if cuda and not on_cuda(t) and not number and id(t) not in free:
                if name != "aten::copy_":
                    raise RuntimeError(f"tensors of cuda:0 and cpu in {operation}")
        before = [address(t) for t in inputs]
        out = operation(*args, **(kwargs or {}))
        for t in tensors(out):
            if address(t) not in before:  # neither a view nor changed in place
                label(t, cuda if inputs else self.wanted == "cuda")
        return out


class Calls(TorchFunctionMode):
    """Above it, what Python asks of devices: x.device, x.to(...), x.numpy(), device=..."""

    def __init__(self, operations):
        super().__init__()
        self.operations = operations

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", "")
        if function == torch.Tensor.device.__get__:
            return torch.device("cuda" if on_cuda(args[0]) else "cpu")
        if name in ("numpy", "__array__") and on_cuda(args[0]):
            raise TypeError("a tensor of cuda:0 cannot become NumPy's: .cpu() first")
        if name == "as_tensor" and isinstance(args[0], torch.Tensor):
            name = "to"
        if name in ("to", "cpu", "cuda"):
            return self.move(name, *args, **kwargs)
        given = kwargs.pop("device", None)
        inputs = tensors((args, kwargs))
        device = "cuda" if inputs and on_cuda(inputs[0]) else "cpu"
        if given is not None:
            device = torch.device(given).type
        g = kwargs.get("generator")
        if g is not None and g.device.type != device:
            raise RuntimeError(f"a generator of {g.device} for a tensor of {device} in {name}")
        before, self.operations.wanted = self.operations.wanted, device
        try:
            out = function(*args, **kwargs)
            if given is not None:
                for t in tensors(out):
                    label(t, device == "cuda")  # torch.tensor(3.0) is no operation
            return out
        finally:
            self.operations.wanted = before

    def move(self, name, t, *args, device=None, **options):
        """x.to(device), x.to(dtype), x.to(device, dtype), x.to(other), x.cpu(), x.cuda()"""
        if name != "to":
            device = name
        for a in args:
            if isinstance(a, torch.Tensor):
                options["dtype"] = a.dtype
                device = "cuda" if on_cuda(a) else "cpu"
            elif isinstance(a, torch.dtype):
                options["dtype"] = a
            elif isinstance(a, (str, torch.device)):
                device = a
        cuda = on_cuda(t) if device is None else torch.device(device).type == "cuda"
        out = plain_to(t, **options) if options else t
        if cuda != on_cuda(out):
            out = out.clone()
            label(out, cuda)
        return out


def save(value, *rest):
    if any(on_cuda(t) for t in tensors(value)):
        raise RuntimeError("a file with a tensor of cuda:0: no machine without a GPU loads it")
    plain_save(value, *rest)


def check_self():
    """Each of these is an error on a GPU, and must be one here; what follows is none."""
    x = torch.ones(3, device="cuda", requires_grad=True)
    net = torch.nn.Linear(3, 3).to("cuda")
    g = common.generator(0, "check", "cuda")
    errors = [lambda: x + torch.zeros(3), lambda: torch.stack([x.cpu(), x]),
              lambda: net(torch.ones(3)), lambda: net(x).backward(torch.ones(3)),
              lambda: torch.zeros(3)[torch.arange(2, device="cuda")].add(x[:2]),
              lambda: torch.zeros(3).add_(x), lambda: x.detach().numpy(),
              lambda: torch.randn(3, generator=g), lambda: torch.rand_like(x) @ torch.eye(3),
              lambda: torch.vmap(lambda row: row + torch.zeros(3))(x.expand(2, 3)),
              lambda: torch.save({"x": [x]}, os.devnull)]
    for k, error in enumerate(errors):
        try:
            error()
        except (RuntimeError, TypeError):
            continue
        raise SystemExit(f"tests/devices.py is broken: planted error {k} was not seen")
    optimiser = torch.optim.Adam(net.parameters(), fused=True)
    noise = torch.randn(3, generator=g, device=x.device)
    (net(2 * x + noise).sum() * torch.tensor(2.0)).backward()
    optimiser.step()
    for part in (net, optimiser):  # as common.restore does
        part.load_state_dict(common.on_cpu(part.state_dict()))
    optimiser.step()
    assert net.weight.device.type == net.weight.grad.device.type == "cuda"
    assert x[torch.arange(2)].cpu().device.type == "cpu" == torch.zeros(3).device.type


def main(scripts):
    torch.Generator, torch.save, common.device = Generator, save, str
    common.EVERY = 0.5  # checkpoints, too
    torch.cuda.synchronize = lambda: None
    torch.cuda.get_device_name = lambda: "labels"
    Figure.savefig = lambda *_, **options: None  # drawing takes half of the time
    eae = importlib.import_module("eae_simmering")
    spiral = eae.spiral  # a minute of simulation: its first frames again and again do here
    eae.spiral = lambda frames, **options: itertools.islice(
        itertools.cycle(list(spiral(20, **options))), frames)
    eae.FRAME = 0.5  # of integrated paths: a tenth of their steps
    failed = 0
    operations = Operations()
    with tempfile.TemporaryDirectory() as folder, Calls(operations), operations:
        check_self()
        for script in scripts or SCRIPTS:
            start = time.time()
            flags = ["--preset", "smoke", "--device", "cuda", "--out", f"{folder}/{script}"]
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    importlib.import_module(script).main(flags + SCRIPTS[script].split())
            except Exception:
                traceback.print_exc()
                failed = 1
                continue
            print(f"{script}: no mix of devices, {time.time() - start:.0f} s", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
