"""The fla backend: on any device against stand-ins for fla's kernels, on CUDA with real ones."""

import inspect
import sys
from importlib.metadata import PackageNotFoundError
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from longspan.attention import linear_attention
from longspan.attention.linear import fla as linear_fla

from .recurrence import FAMILIES, document_ids, errors, make, recurrence

# Rows with different numbers of documents, some of a single token.
DOCUMENTS = {"one": None, "several": [[20], [10, 1, 8, 1]]}
# Documents that begin inside fla's chunks of 64 and on their edges.
LONG = {"one": None, "edges": [[17, 1, 46, 64, 1, 71], [3, 125, 72]]}
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3}
SHAPES = {
    "alike": {"key_heads": 4, "dim": 32, "value_dim": 16},
    "grouped, odd": {"dim": 9, "value_dim": 5},
}


def operation(decay_dims=None, delta=False, grouped=False):
    """Return a stand-in for an operation of fla 0.6.0, with its defaults and limits.

    It computes the recurrence, and expects a ``g`` of ``decay_dims`` dims.
    """

    def run(
        q,
        k,
        v,
        g=None,
        beta=None,
        scale=None,
        initial_state=None,
        output_final_state=False,
        cu_seqlens=None,
        cu_seqlens_cpu=None,
    ):
        heads = v.shape[2]
        assert q.shape == k.shape
        assert grouped or q.shape[2] == heads
        assert q.shape[3] % 16 == v.shape[3] % 16 == 0
        assert {q.dtype} == {k.dtype} == {v.dtype}
        assert (None if g is None else g.ndim) == decay_dims
        assert g is None or (g.dtype == torch.float32 and g.shape[:3] == v.shape[:3])
        assert (beta is not None) == delta
        assert initial_state.dtype == torch.float32
        scale = q.shape[3] ** -0.5 if scale is None else scale
        edges = [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
        if cu_seqlens is None:
            out, last = recurrence(q, k, v, initial_state, g, beta, scale)
        else:
            assert q.shape[0] == 1
            assert len(initial_state) == len(edges) - 1
            assert torch.equal(cu_seqlens.cpu(), cu_seqlens_cpu)
            assert edges[-1] == q.shape[1]
            outs = []
            final_states = []
            for i, (start, stop) in enumerate(pairwise(edges)):
                tokens = [None if x is None else x[:, start:stop] for x in (q, k, v, g, beta)]
                document_out, final_state = recurrence(
                    *tokens[:3], initial_state[i, None], *tokens[3:], scale
                )
                outs.append(document_out)
                final_states.append(final_state)
            out = torch.cat(outs, 1)
            last = torch.cat(final_states, 0)
        return out, last if output_final_state else None

    return run


OPERATIONS = {
    "none": ("chunk_simple_gla", operation()),
    "constant": ("chunk_simple_gla", operation(3)),
    "scalar": ("chunk_simple_gla", operation(3)),
    "vector": ("chunk_gla", operation(4)),
    "delta": ("chunk_delta_rule", operation(delta=True)),
    "gated delta": ("chunk_gated_delta_rule", operation(3, delta=True, grouped=True)),
    "gated delta by key": ("chunk_kda", operation(4, delta=True, grouped=True)),
}


@pytest.fixture
def install(monkeypatch):
    """Let the backend run on any device, and give ``fla.ops`` these attributes."""

    def install(**operations):
        monkeypatch.setitem(sys.modules, "fla.ops", SimpleNamespace(**operations))
        monkeypatch.setattr(linear_fla, "_missing", lambda: None)
        monkeypatch.setattr(linear_fla, "_miscompiled_by", lambda capability: None)
        monkeypatch.setattr(linear_fla, "_DEVICES", {"cpu"})
        monkeypatch.setattr(linear_fla, "_DTYPES", ({torch.float32},))

    return install


def run(**arguments):
    return linear_attention(**arguments, return_state=True, backend="fla")


@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_parity_through_stand_ins_for_flas_operations(install, family, shape, documents):
    name, like_fla = OPERATIONS[family]
    install(**{name: like_fla})
    arguments = make(family, 20, dtype=torch.float32, **shape)
    error_by_name = errors(run, arguments, scale=0.7, documents=document_ids(documents))
    assert max(error_by_name.values()) < 1e-5, error_by_name


@pytest.mark.parametrize("family", FAMILIES)
def test_training_works_after_inference_mode(install, family):
    name, like_fla = OPERATIONS[family]
    install(**{name: like_fla})
    arguments = make(family, 20, dtype=torch.float32)
    documents = document_ids([[3, 17], [9, 11]])
    with torch.inference_mode():
        run(**arguments, documents=documents)
    assert max(errors(run, arguments, documents=documents).values()) < 1e-5


def test_no_tokens(install):
    install()
    arguments = make("none", 0, dtype=torch.float32)
    out, final_state = run(**arguments)
    assert out.shape == arguments["v"].shape
    assert torch.equal(final_state, arguments["state"])


@pytest.mark.parametrize("family", FAMILIES)
def test_calls_bind_to_flas_real_signatures(install, family):
    name, like_fla = OPERATIONS[family]
    real = inspect.signature(
        getattr(pytest.importorskip("fla.ops", reason="needs flash-linear-attention"), name)
    )
    if reason := linear_fla._missing():
        pytest.skip(reason)

    def bound(**keywords):
        arguments = real.bind(**keywords)
        arguments.apply_defaults()
        switches = {
            "use_qk_l2norm_in_kernel",
            "use_beta_sigmoid_in_kernel",
            "state_v_first",
            "safe_gate",
            "use_graph",
        }
        assert not any(
            arguments.arguments.get(x) for x in (*switches, "g_gamma", "kwargs", "lower_bound")
        )
        return like_fla(**keywords)

    install(**{name: bound})
    run(**make(family, 20, dtype=torch.float32), documents=document_ids([[3, 17], [9, 11]]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"dtype": torch.float32},
            r"fla needs q, k and v all in bf16 or fp16, not in torch.float32.*; use torch",
        ),
        (
            {"family": "delta", "dim": 257},
            r"fla supports the delta rule \(beta\) for key dims up to 256, not 257; use torch",
        ),
        ({}, r"fla needs CUDA, but q is on cpu; use torch"),
    ],
)
def test_unsupported_calls_are_refused(change, message):
    settings = {"family": "none", "dim": 16, "dtype": torch.bfloat16} | change
    with pytest.raises(ValueError, match=message):
        run(**tensors(**settings))


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        ({}, r"needs a package: pip install 'longspan\[gpu\]' \(.*fla-core\)"),
        ({"fla-core": "0.5.2"}, r"fla-core is 0\.5\.2, must be at least 0\.6\.0"),
    ],
)
def test_missing_or_old_packages_are_reported(monkeypatch, versions, message):
    def version(package):
        if package not in versions:
            raise PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(linear_fla, "_DEVICES", {"cpu"})
    monkeypatch.setattr(linear_fla, "version", version)
    linear_fla._missing.cache_clear()
    with pytest.raises(ValueError, match=message):
        run(**tensors("vector"))
    linear_fla._missing.cache_clear()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("triton", "capability", "miscompiles"),
    [("3.6.0", 90, True), ("3.7.1", 90, False), ("3.6.0", 100, False)],
)
def test_families_that_triton_miscompiles_for_hopper_are_refused(
    monkeypatch, triton, capability, miscompiles, family
):
    monkeypatch.setattr(linear_fla, "_DEVICES", {"cpu"})
    monkeypatch.setattr(linear_fla, "_missing", lambda: None)
    monkeypatch.setattr(linear_fla, "compute_capability", lambda device: capability)
    monkeypatch.setattr(
        linear_fla, "import_module", lambda name: SimpleNamespace(__version__=triton)
    )
    monkeypatch.setattr(linear_fla, "_miscompiled_by", linear_fla._miscompiled_by.__wrapped__)
    arguments = tensors(family)
    reason = linear_fla.unsupported_reason(
        *(arguments.get(name) for name in ("q", "k", "v", "decay", "beta"))
    )
    if miscompiles and family in ("constant", "scalar", "gated delta"):
        assert reason.endswith("by Triton 3.6.0, must be at least 3.7.1; use torch")
    else:
        assert reason is None


def tensors(family, dim=16, dtype=torch.bfloat16):
    """Return detached arguments: q, k, v and beta in ``dtype``, the others in fp32."""
    arguments = make(family, 8, dim=dim, dtype=torch.float32)
    return {
        name: x.detach().to(dtype) if name in ("q", "k", "v", "beta") else x.detach()
        for name, x in arguments.items()
    }


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnCuda:
    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    @pytest.mark.parametrize("documents", LONG.values(), ids=LONG)
    @pytest.mark.parametrize(
        "shape",
        [{"key_heads": 4, "dim": 64, "value_dim": 128}, {"dim": 20, "value_dim": 33}],
        ids=str,
    )
    @pytest.mark.parametrize("family", FAMILIES)
    def test_parity(self, family, shape, documents, dtype):
        error_by_name = self.errors(family, dtype, documents, **shape)
        assert max(error_by_name.values()) < TOLERANCE[dtype], error_by_name

    @pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("none", "delta")])
    def test_strong_decays(self, family):
        error_by_name = self.errors(
            family, torch.bfloat16, LONG["edges"], dim=64, value_dim=64, strength=150.0
        )
        assert max(error_by_name.values()) < TOLERANCE[torch.bfloat16], error_by_name

    @staticmethod
    def errors(family, dtype, documents, **shape):
        """Compare with the recurrence on the CPU, from the same rounded inputs."""
        pytest.importorskip("fla.ops", reason="needs flash-linear-attention")
        rounded = {
            name: x.detach().to(dtype if name in "qkv" else x.dtype).requires_grad_()
            for name, x in make(family, 200, dtype=torch.float32, **shape).items()
        }

        def on_cuda(scale, documents, **arguments):
            arguments = {name: x.cuda() for name, x in arguments.items()}
            if reason := linear_fla.unsupported_reason(
                *(arguments.get(name) for name in ("q", "k", "v", "decay", "beta"))
            ):
                pytest.skip(reason)
            return run(
                **arguments, scale=scale, documents=None if documents is None else documents.cuda()
            )

        return errors(on_cuda, rounded, scale=0.7, documents=document_ids(documents))
