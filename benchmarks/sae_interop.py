"""Agreement with the packages that write the foreign formats: their SAEs, saved by them, opened by us.

Run it in an environment of its own that has this package and the two (they need other versions of much else):

    pip install -e . eai-sparsify sae-lens && python benchmarks/sae_interop.py

For every kind of SAE with random weights, prints the largest difference of activations and reconstructions over 200
random tokens, relative to the largest value, and whether the same features are active.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from qscope_trl.sae.suite import SAESuite

D_MODEL, D_SAE, K, LAYER = 24, 96, 8, 5


def randomise(module: nn.Module) -> None:
    """Normal values everywhere, so that no bias is zero and no norm is one."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()


def compare(name: str, folder: Path, layer: int, x: Tensor, encode: Callable[[Tensor], tuple[Tensor, Tensor]]) -> bool:
    """Print how far we are from what the other package computes; whether that is within fp32 rounding."""
    with torch.no_grad():
        acts, x_hat = encode(x)
    ours = SAESuite.from_pretrained(folder).load(layer)
    found, found_hat = ours.feature_acts(x), ours(x)
    is_same = torch.equal(found > 0, acts > 0)
    far_acts = float((found - acts).abs().max() / acts.abs().max())
    far_hat = float((found_hat - x_hat).abs().max() / x_hat.abs().max())
    print(f"{name:58} active features equal: {is_same}; activations {far_acts:.1e}, reconstructions {far_hat:.1e}")
    return is_same and max(far_acts, far_hat) < 1e-5


def sparsify(folder: Path, x: Tensor) -> list[bool]:
    """TopK SAEs of EleutherAI/sparsify."""
    from sparsify.sparse_coder import SparseCoder, SparseCoderConfig

    results = []
    for sizes in ({"num_latents": D_SAE}, {"expansion_factor": D_SAE // D_MODEL}):
        sae = SparseCoder(D_MODEL, SparseCoderConfig(k=K, **sizes))
        randomise(sae)
        target = folder / f"sparsify-{next(iter(sizes))}"
        sae.save_to_disk(target / f"layers.{LAYER}")

        def encode(x: Tensor, sae: SparseCoder = sae) -> tuple[Tensor, Tensor]:
            acts, indices, _ = sae.encode(x)
            return torch.zeros(len(x), D_SAE).scatter_(1, indices, acts), sae.decode(acts, indices)

        results.append(compare(f"sparsify, {next(iter(sizes))}", target, LAYER, x, encode))
    return results


def saelens(folder: Path, x: Tensor) -> list[bool]:
    """TopK, rescaled TopK, standard and JumpReLU SAEs of SAELens, with and without centring, at both hooks."""
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    results = []
    for kind, config_kind, options in [
        (TopKSAE, TopKSAEConfig, {"k": K}),
        (TopKSAE, TopKSAEConfig, {"k": K, "rescale_acts_by_decoder_norm": True}),
        (StandardSAE, StandardSAEConfig, {}),
        (JumpReLUSAE, JumpReLUSAEConfig, {}),
    ]:
        for is_centred in (True, False):
            for hook in ("post", "pre"):
                metadata = SAEMetadata(hook_name=f"blocks.{LAYER}.hook_resid_{hook}")
                sizes = {"d_in": D_MODEL, "d_sae": D_SAE, "apply_b_dec_to_input": is_centred, "metadata": metadata}
                sae = kind(config_kind(**sizes, **options))
                randomise(sae)
                if kind is JumpReLUSAE:
                    sae.threshold.data.abs_()
                target = folder / f"{len(results)}"
                sae.save_model(target)

                def encode(x: Tensor, sae: nn.Module = sae) -> tuple[Tensor, Tensor]:
                    acts = sae.encode(x)
                    return acts, sae.decode(acts)

                rescaled = ", rescaled" if len(options) > 1 else ""
                name = f"SAELens {kind.__name__}{rescaled}, {'' if is_centred else 'not '}centred, resid_{hook}"
                results.append(compare(name, target, LAYER - (hook == "pre"), x, encode))
    return results


def main() -> None:
    """Compare everything; exit status 1 if anything differs by more than fp32 rounding."""
    torch.manual_seed(0)
    x = torch.randn(200, D_MODEL)
    with tempfile.TemporaryDirectory() as folder:
        results = sparsify(Path(folder), x) + saelens(Path(folder) / "saelens", x)
    print(f"eai-sparsify {version('eai-sparsify')}, sae-lens {version('sae-lens')}, torch {torch.__version__}")
    print(f"{sum(results)} of {len(results)} agree")
    raise SystemExit(not all(results))


if __name__ == "__main__":
    main()
