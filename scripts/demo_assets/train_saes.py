"""Train one TopK SAE per layer on the demo model's residual stream and save them as Qwen-Scope saves its own.

All layers are trained together on the same forward passes. `layer{n}.sae.pt` holds `W_enc (d_sae, d_model)`, `W_dec
(d_model, d_sae)`, `b_enc`, `b_dec`, in fp16 to stay small; `f = x @ W_enc.T + b_enc`, `a = ReLU(TopK(f))`, `x_hat =
a @ W_dec.T + b_dec`: `b_dec` is not subtracted before encoding and the input is not normalised (the scale used in
training is folded into the weights). Position 0 of every window is left out, in training and in evaluation.
"""

import argparse
import json
import logging
import time
from pathlib import Path

import torch
from train_model import pack, read_texts
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

logger = logging.getLogger("train_saes")


class TopKSAE(torch.nn.Module):
    """A TopK SAE on inputs divided by `scale`."""

    def __init__(self, x: torch.Tensor, d_sae: int, k: int) -> None:
        super().__init__()
        d_model = x.shape[1]
        self.k = k
        self.scale = (x - x.mean(0)).pow(2).sum(1).mean().sqrt().item()
        directions = torch.nn.functional.normalize(torch.randn(d_sae, d_model), dim=1)
        self.W_enc = torch.nn.Parameter(directions.clone())
        self.W_dec = torch.nn.Parameter(directions.T.clone())
        self.b_dec = torch.nn.Parameter(x.mean(0) / self.scale)
        self.b_enc = torch.nn.Parameter(-(self.W_enc.detach() @ self.b_dec.detach()))
        self.register_buffer("num_idle", torch.zeros(d_sae))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the normalised MSE, plus 1/32 of the error left when idle features reconstruct the residual error."""
        x = x / self.scale
        pre_acts = x @ self.W_enc.T + self.b_enc
        top_acts, top_indices = pre_acts.topk(self.k, dim=1)
        acts = torch.zeros_like(pre_acts).scatter(1, top_indices, top_acts.relu())
        error = x - (acts @ self.W_dec.T + self.b_dec)
        self.num_idle += len(x)
        self.num_idle[top_indices[top_acts > 0]] = 0
        loss = error.pow(2).sum(1).mean()
        is_idle = self.num_idle > 100_000
        if is_idle.any():
            idle = torch.where(is_idle, pre_acts, -torch.inf)
            idle_acts, idle_indices = idle.topk(min(64, int(is_idle.sum())), dim=1)
            idle_decoded = torch.zeros_like(pre_acts).scatter(1, idle_indices, idle_acts.relu()) @ self.W_dec.T
            loss = loss + (error.detach() - idle_decoded).pow(2).sum(1).mean() / 32
        return loss

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Give every decoder direction unit norm."""
        self.W_dec /= self.W_dec.norm(dim=0, keepdim=True)

    @torch.no_grad()
    def state(self) -> dict[str, torch.Tensor]:
        """Return the checkpoint's four tensors, the scale folded in so that activations are in units of the input."""
        tensors = {
            "W_enc": self.W_enc,
            "W_dec": self.W_dec,
            "b_enc": self.b_enc * self.scale,
            "b_dec": self.b_dec * self.scale,
        }
        return {name: tensor.detach().half().contiguous() for name, tensor in tensors.items()}


def reconstruct(x: torch.Tensor, state: dict[str, torch.Tensor], k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `x_hat` and dense feature activations of a saved SAE, in fp32."""
    weights = {name: tensor.float() for name, tensor in state.items()}
    pre_acts = x @ weights["W_enc"].T + weights["b_enc"]
    top_acts, top_indices = pre_acts.topk(k, dim=-1)
    acts = torch.zeros_like(pre_acts).scatter(-1, top_indices, top_acts.relu())
    return acts @ weights["W_dec"].T + weights["b_dec"], acts


@torch.no_grad()
def residuals(model: PreTrainedModel, batch: torch.Tensor) -> list[torch.Tensor]:
    """Return each layer's output `(B, T, d_model)`, read by hooks as `hidden_states[-1]` is after the final norm."""
    outputs: list[torch.Tensor] = []
    handles = [
        layer.register_forward_hook(lambda _module, _args, output: outputs.append(output.float()))
        for layer in model.model.layers
    ]
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model.model(batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


@torch.no_grad()
def spliced_loss(model: PreTrainedModel, batch: torch.Tensor, layer: int, splice: object) -> float:
    """Return the cross-entropy with a layer's output replaced by `splice(output)`, position 0 left as it is."""

    def hook(_module: torch.nn.Module, _args: object, output: torch.Tensor) -> torch.Tensor:
        return torch.cat([output[:, :1], splice(output[:, 1:])], dim=1)

    handle = model.model.layers[layer].register_forward_hook(hook)
    try:
        return model(batch, labels=batch, use_cache=False).loss.item()
    finally:
        handle.remove()


def evaluate(
    model: PreTrainedModel, states: list[dict[str, torch.Tensor]], tokens: torch.Tensor, k: int
) -> list[dict]:
    """Return per layer: fvu, l0, dead share, and cross-entropy recovered relative to ablation by the mean."""
    batch = tokens[: 160 * 128].view(128, 160).long()
    outputs = [torch.cat(parts) for parts in zip(*(residuals(model, part) for part in batch.split(32)), strict=True)]
    with torch.no_grad():
        clean = model(batch[:48], labels=batch[:48], use_cache=False).loss.item()
    rows = []
    for layer, state in enumerate(states):
        x = outputs[layer][:, 1:].flatten(0, 1)
        x_hat, acts = reconstruct(x, state, k)
        mean = x.mean(0)
        spliced = spliced_loss(model, batch[:48], layer, lambda h, state=state: reconstruct(h, state, k)[0])
        ablated = spliced_loss(model, batch[:48], layer, lambda h, mean=mean: mean.expand_as(h))
        rows.append(
            {
                "layer": layer,
                "fvu": round(((x - x_hat).pow(2).sum() / (x - mean).pow(2).sum()).item(), 4),
                "l0": round((acts > 0).sum(1).float().mean().item(), 2),
                "dead": round((acts > 0).any(0).logical_not().float().mean().item(), 4),
                "ce": round(clean, 4),
                "ce_spliced": round(spliced, 4),
                "ce_ablated": round(ablated, 4),
                "ce_recovered": round((ablated - spliced) / (ablated - clean), 4),
            }
        )
        logger.info("%s", rows[-1])
    return rows


def main() -> None:
    """Parse the command line, train, save, evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model and tokenizer")
    parser.add_argument("--pretrain", type=Path, required=True, help="JSON lines file of make_data.py")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder of the SAEs, e.g. .../SAE-Res-QScopeDemo-W2K-L0_16"
    )
    parser.add_argument("--expansion", type=int, default=16, help="features per model dimension")
    parser.add_argument("--k", type=int, default=16, help="active features per token")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=16, help="windows per step")
    parser.add_argument("--window", type=int, default=160)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument(
        "--max-minutes", type=float, default=0.0, help="end the decay by then at the latest (0: no limit)"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval().requires_grad_(False)
    texts = read_texts(args.pretrain)
    tokens = pack(tokenizer, texts[: len(texts) // 4])
    validation = pack(tokenizer, read_texts(args.pretrain.with_suffix(".validation.jsonl")))

    def draw(num_windows: int) -> torch.Tensor:
        starts = torch.randint(len(tokens) - args.window, (num_windows,)).tolist()
        return torch.stack([tokens[i : i + args.window] for i in starts]).long()

    first = residuals(model, draw(64))
    saes = [TopKSAE(x[:, 1:].flatten(0, 1), args.expansion * x.shape[-1], args.k) for x in first]
    optimizer = torch.optim.Adam(
        [parameter for sae in saes for parameter in sae.parameters()],
        lr=args.learning_rate,
        betas=(0.9, 0.99),
        fused=True,
    )
    start = time.perf_counter()
    for step in range(args.steps):
        progress = step / args.steps
        if args.max_minutes:
            progress = max(progress, (time.perf_counter() - start) / (60 * args.max_minutes))
        if progress >= 1:
            logger.info("stopped after %d steps: time is up", step)
            break
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min(1.0, (step + 1) / 50, 2.5 * (1 - progress))
        losses = []
        for sae, x in zip(saes, residuals(model, draw(args.batch_size)), strict=True):
            loss = sae(x[:, 1:].flatten(0, 1))
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for sae in saes:
            sae.normalise_decoder()
        if (step + 1) % 50 == 0:
            idle = [int((sae.num_idle > 100_000).sum()) for sae in saes]
            seconds = (time.perf_counter() - start) / (step + 1)
            logger.info(
                "step %d loss %s idle %s seconds/step %.2f", step + 1, [round(v, 3) for v in losses], idle, seconds
            )

    args.output.mkdir(parents=True, exist_ok=True)
    states = [sae.state() for sae in saes]
    for layer, state in enumerate(states):
        torch.save(state, args.output / f"layer{layer}.sae.pt")
    rows = evaluate(model, states, validation, args.k)
    (args.output / "evaluation.json").write_text(json.dumps(rows, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
