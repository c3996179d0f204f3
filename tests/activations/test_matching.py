"""Firing rates against a dense count, text by text."""

from __future__ import annotations

from pathlib import Path

import torch

from qscope_trl import SAESuite
from qscope_trl.activations.matching import token_rates
from qscope_trl.hooks.layers import find_layers
from tests.tiny import K, random_sae, sentence, tiny_model, tiny_tokenizer, write_saes


def test_rates_count_every_token_but_the_first(tmp_path: Path) -> None:
    model, tokenizer = tiny_model().eval(), tiny_tokenizer()
    generator = torch.Generator().manual_seed(0)
    texts = [sentence(generator, length) for length in (7, 12, 3)]
    saes = SAESuite.from_pretrained(write_saes(tmp_path), k=K)
    found = token_rates(model, tokenizer, saes, (1, 3), texts, batch_size=2, show_progress=False)
    for layer in (1, 3):
        sae, active = random_sae(100 + layer), []
        for text in texts:
            seen: list[torch.Tensor] = []
            handle = find_layers(model)[layer].register_forward_hook(lambda _m, _a, x, seen=seen: seen.append(x))
            with torch.no_grad():
                model(torch.tensor([tokenizer(text)["input_ids"]]))
            handle.remove()
            f = seen[0][0, 1:].double() @ sae["W_enc"].double().T + sae["b_enc"].double()
            kept = torch.zeros_like(f).scatter_(-1, f.topk(K).indices, 1.0)
            active.append((f.relu() * kept) > 0)
        assert torch.allclose(found[layer], torch.cat(active).double().mean(0))
