"""How much faster `Substitute` rewrites the prompts of a class set than the same search one string at a time.

Both attack the 120 `object` prompts of the scenes with `Words(1)`; their outputs are asserted equal. The loop is the
published shape of the search: for each text a forward of the language model, then of the victim for each masked word
and for each candidate. It is measured twice: `one_by_one` asks for one string at a time, `per_text` for all strings of
one text at once (as Co-Attack's code does). `cold` reads every string anew; `warm` finds the candidates remembered,
as every training step but the first does.

    python benchmarks/text.py [--runs 5] [--model fresh]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from crossguard.attacks.candidates import EMBEDDED, MaskedLM, Proposals, attackable, forget
from crossguard.attacks.text import Substitute

Victim = Callable[[Sequence[str]], Tensor]


class Loop:
    """BERT-Attack with one substitution, one text after the other."""

    def __init__(self, victim: Victim, one_by_one: bool, remembered: dict[str, Proposals] | None) -> None:
        from transformers import AutoModelForMaskedLM, AutoTokenizer

        self.victim, self.one_by_one, self.remembered = victim, one_by_one, remembered
        self.tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
        self.model = AutoModelForMaskedLM.from_pretrained(EMBEDDED, dtype=torch.float32).eval()

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> list[str]:
        return [self.attack(text) for text in texts]

    def drift(self, clean: Tensor, strings: Sequence[str]) -> Tensor:
        parts = [[one] for one in strings] if self.one_by_one else [strings]
        embeddings = torch.cat([self.victim(part) for part in parts])
        return 1.0 - F.cosine_similarity(embeddings, clean, dim=1)

    def candidates(self, text: str) -> list[list[str]]:
        if self.remembered is not None:
            return [[candidate.word for candidate in found] for found in self.remembered[text]]
        words = text.split(" ")
        pieces = [self.tokenizer.encode(word, add_special_tokens=False) for word in words]
        assert all(len(piece) == 1 for piece in pieces)  # so it is for the words of the scenes
        ids = [self.tokenizer.cls_token_id, *(piece[0] for piece in pieces), self.tokenizer.sep_token_id]
        logits = self.model(input_ids=torch.tensor([ids])).logits[0, 1:-1]
        logits[:, self.tokenizer.all_special_ids] = -torch.inf
        best = logits.topk(10, dim=-1)
        found: list[list[str]] = []
        for word, values, indices in zip(words, best.values.tolist(), best.indices.tolist(), strict=True):
            names = self.tokenizer.convert_ids_to_tokens(indices)
            likely = [name for name, value in zip(names, values, strict=True) if value >= 0.3]
            good = [name for name in likely if name.isalnum() and attackable(name) and name != word]
            found.append(good if attackable(word) else [])
        return found

    def attack(self, text: str) -> str:
        words, options = text.split(" "), self.candidates(text)
        clean = self.victim([text])
        masked = [" ".join([*words[:i], "[UNK]", *words[i + 1 :]]) for i in range(len(words))]
        importance = self.drift(clean, masked)
        importance[[not option for option in options]] = -torch.inf
        while float(importance.max()) > -torch.inf:
            place = int((importance >= importance.max() - 1e-6).nonzero()[0, 0])  # the first of those that tie
            importance[place] = -torch.inf
            variants = [" ".join([*words[:place], word, *words[place + 1 :]]) for word in options[place]]
            drift = self.drift(clean, variants)
            if float(drift.max()) > 1e-6:
                return variants[int((drift >= drift.max() - 1e-6).nonzero()[0, 0])]
        return text


def median(runs: int, work: Callable[[], object], before: Callable[[], object]) -> float:
    times: list[float] = []
    for _ in range(runs):
        before()
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--model", choices=["tiny", "fresh"], default="tiny", help="fresh has random weights")
    options = parser.parse_args()
    torch.set_num_threads(1)

    from crossguard.attacks import candidates
    from crossguard.datasets.embedded import Scenes
    from crossguard.models.embedded import Tiny
    from crossguard.models.fresh import Fresh

    model = Tiny() if options.model == "tiny" else Fresh()
    clean = Scenes(classes="object").prompts().flat
    attack = Substitute(MaskedLM())

    def victim(texts: Sequence[str]) -> Tensor:
        return model.encode_text(texts)

    def nothing() -> None:
        pass

    found = attack(victim, clean)
    remembered = dict(zip(clean, attack.source.propose(clean), strict=True))
    changed = sum(new != old for new, old in zip(found, clean, strict=True))
    print(f"{len(clean)} texts, {changed} changed, such as {clean[0]!r} -> {found[0]!r}")
    fast = {
        "cold": median(options.runs, lambda: attack(victim, clean), candidates._remembered.clear),
        "warm": median(options.runs, lambda: attack(victim, clean), nothing),
    }
    ratios: dict[str, float] = {}
    for name, one_by_one in (("one_by_one", True), ("per_text", False)):
        for state, memory in (("cold", None), ("warm", remembered)):
            loop = Loop(victim, one_by_one, memory)
            differing = sum(one != other for one, other in zip(loop(clean), found, strict=True))
            # random weights put all texts within 1e-5 of each other, where rounding decides some ties
            allowed = 0 if options.model == "tiny" else len(clean) // 50
            assert differing <= allowed, f"the loop ({name}, {state}) found {differing} other texts"
            slow = median(options.runs, lambda loop=loop: loop(clean), nothing)
            ratios[f"text_{name}_{state}"] = round(slow / fast[state], 1)
            print(f"{name:10} {state}: {slow * 1e3:8.1f} ms against {fast[state] * 1e3:6.1f} ms")
    forget()
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
