"""Train the demo's tokenizer and its tiny Qwen3 from scratch on the text of make_data.py.

The tokenizer is a byte-level BPE of 4096 entries. Documents are packed end to end, separated by the end-of-sequence
token, and cut into windows at a random offset. Muon for the layers' matrices, AdamW for embeddings and norms, linear
warm-up and cosine decay; embeddings tied; weights saved as bf16.
"""

import argparse
import json
import logging
import math
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

logger = logging.getLogger("train_model")

EOS, PAD = "<|endoftext|>", "<|pad|>"


def read_texts(path: Path) -> list[str]:
    """Read the `text` column of a JSON lines file."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        model_input_names=["input_ids", "attention_mask"],
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def pack(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Return all token ids end to end, an end-of-sequence token after each text, as int16."""
    ids: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch(texts):
        ids.extend(encoding.ids)
        ids.append(tokenizer.eos_token_id)
    return torch.from_numpy(np.asarray(ids, dtype=np.int16))


def make_model(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> Qwen3ForCausalLM:
    """Return a randomly initialised model."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=3 * args.hidden_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.hidden_size // 32,
        num_key_value_heads=args.hidden_size // 64,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    # Faster than the fused kernel on CPU at this length, and the same function.
    config._attn_implementation = "eager"
    return Qwen3ForCausalLM(config)


@torch.no_grad()
def evaluate(model: Qwen3ForCausalLM, tokens: torch.Tensor, window: int) -> float:
    """Return the mean cross-entropy in nats per token over non-overlapping windows."""
    model.eval()
    num_windows = min(len(tokens) // window, 128)
    losses = []
    for batch in tokens[: num_windows * window].view(num_windows, window).long().split(16):
        losses.append(model(batch, labels=batch).loss.item())
    model.train()
    return sum(losses) / len(losses)


def train(model: Qwen3ForCausalLM, tokens: torch.Tensor, validation: torch.Tensor, args: argparse.Namespace) -> None:
    """Run the pretraining loop in place, logging the loss."""
    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.dim() == 2]
    others = [parameter for parameter in model.parameters() if all(parameter is not matrix for matrix in matrices)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=args.learning_rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    num_warmup = 100
    generator = torch.Generator().manual_seed(args.seed)
    # Every window is seen once before any is seen again; the offset changes from epoch to epoch.
    order = torch.empty(0, dtype=torch.long)
    start = time.perf_counter()
    running = 0.0
    forward = torch.compile(model) if args.compile else model
    for step in range(args.steps):
        if len(order) < args.batch_size:
            offset = int(torch.randint(args.window, (1,), generator=generator))
            num_windows = (len(tokens) - offset) // args.window
            order = offset + args.window * torch.randperm(num_windows, generator=generator)
        rows, order = order[: args.batch_size], order[args.batch_size :]
        batch = torch.stack([tokens[i : i + args.window] for i in rows.tolist()]).long()
        progress = step / args.steps
        if args.max_minutes:
            progress = max(progress, (time.perf_counter() - start) / (60 * args.max_minutes))
        if progress >= 1:
            logger.info("stopped after %d steps: time is up", step)
            break
        decay = 0.5 * (1 + math.cos(math.pi * progress))
        rate = args.learning_rate * min(1.0, (step + 1) / num_warmup) * (0.05 + 0.95 * decay)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.autocast):
            logits = forward(batch, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        running += loss.item()
        if (step + 1) % args.log_every == 0:
            seconds = (time.perf_counter() - start) / (step + 1)
            message = "step %d loss %.3f rate %.1e seconds/step %.3f"
            logger.info(message, step + 1, running / args.log_every, rate, seconds)
            running = 0.0
        if (step + 1) % (10 * args.log_every) == 0:
            logger.info("step %d validation %.3f", step + 1, evaluate(model, validation, args.window))
        if args.save_every and (step + 1) % args.save_every == 0:
            model.save_pretrained(args.output)


def main() -> None:
    """Parse the command line, train, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrain", type=Path, required=True, help="JSON lines file of make_data.py")
    parser.add_argument("--output", type=Path, required=True, help="folder for model and tokenizer")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--num-layers", type=int, default=6)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--window", type=int, default=160)
    parser.add_argument("--learning-rate", type=float, default=6e-3)
    parser.add_argument("--autocast", action=argparse.BooleanOptionalAction, default=True, help="bf16 autocast")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile")
    parser.add_argument(
        "--max-minutes", type=float, default=0.0, help="end the decay by then at the latest (0: no limit)"
    )
    parser.add_argument("--save-every", type=int, default=0, help="also save during training (0: only at the end)")
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    texts = read_texts(args.pretrain)
    # One pass in eight is enough for the merges; the passes differ only in what is code-switched.
    tokenizer = train_tokenizer(texts[: len(texts) // 8], args.vocab_size)
    tokenizer.save_pretrained(args.output)
    tokens = pack(tokenizer, texts)
    validation = pack(tokenizer, read_texts(args.pretrain.with_suffix(".validation.jsonl")))
    model = make_model(tokenizer, args)
    logger.info("%d tokens, %d held out, %d parameters", len(tokens), len(validation), model.num_parameters())
    train(model, tokens, validation, args)
    logger.info("validation %.4f", evaluate(model, validation, args.window))
    model.to(torch.bfloat16).save_pretrained(args.output)


if __name__ == "__main__":
    main()
