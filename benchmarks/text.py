"""How much faster `Substitute` rewrites texts than the same search one string at a time.

    python benchmarks/text.py                                      # the 120 object prompts on the shipped model
    python benchmarks/text.py --texts 120 1000 5000 --sample 60    # and captions of the scenes
    python benchmarks/text.py --model b32 --texts 120 1000 5000 --sample 12 --runs 1
    python benchmarks/text.py --long                               # a word of ten pieces

Both attack the same texts with `Words(1)`; their outputs are asserted equal. The loop is the published shape of the
search: for each text a forward of the language model, then of the victim for each masked word and for each candidate.
It is measured twice: `one_by_one` asks for one string at a time, `per_text` for all strings of one text at once (as
Co-Attack's code does). `cold` reads every string anew; `warm` finds the candidates remembered, as every training step
but the first does. Where the loop would take hours it runs on a sample of the texts and is compared text for text.
`b32` is a text tower of the size of CLIP ViT-B/32 with random weights. Peak memory is that of a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from checkpoints import b32
from torch import Tensor

from crossguard.attacks.candidates import EMBEDDED, MaskedLM, Proposals, attackable, forget
from crossguard.attacks.text import Substitute
from crossguard.models.base import VisionLanguageModel

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


def model_of(name: str, folder: Path) -> VisionLanguageModel:
    from crossguard import Fresh, Tiny

    if name == "tiny":
        return Tiny()
    if name == "fresh":
        return Fresh()
    return b32(folder)


def texts_of(count: int) -> list[str]:
    """The object prompts of the scenes, or as many of their captions, all distinct."""
    from crossguard import Scenes

    prompts = Scenes(classes="object").prompts().flat
    if count <= len(prompts):
        return prompts[:count]
    data = Scenes(classes="object", split="train")
    found: dict[str, None] = {}
    for index in range(len(data)):
        found.update(dict.fromkeys(data.captions(index)))
        if len(found) >= count:
            break
    return list(found)[:count]


def compare(model: VisionLanguageModel, clean: list[str], options: argparse.Namespace) -> dict[str, float]:
    from crossguard.attacks import candidates

    attack = Substitute(MaskedLM())

    def victim(texts: Sequence[str]) -> Tensor:
        return model.encode_text(texts)

    def nothing() -> None:
        pass

    found: list[str] = []
    attack(victim, clean[:8])
    forget()
    fast = {"cold": median(options.runs, lambda: found.extend(attack(victim, clean)), candidates._remembered.clear)}
    if not options.cold:
        fast["warm"] = median(options.runs, lambda: attack(victim, clean), nothing)
    changed = sum(new != old for new, old in zip(found, clean, strict=False))
    print(f"{len(clean)} texts, {changed} changed, such as {clean[0]!r} -> {found[0]!r}")
    rows = range(len(clean))[:: max(1, len(clean) // (options.sample or len(clean)))]
    some, expected = [clean[row] for row in rows], [found[row] for row in rows]
    remembered = dict(zip(some, attack.source.propose(some), strict=True))
    ratios: dict[str, float] = {}
    for name, one_by_one in (("one_by_one", True), ("per_text", False)):
        for state, memory in (("cold", None), ("warm", remembered)):
            if state not in fast:
                continue
            loop = Loop(victim, one_by_one, memory)
            differing = sum(one != other for one, other in zip(loop(some), expected, strict=True))
            # random weights put all texts within 1e-5 of each other, where rounding decides some ties
            allowed = 0 if options.model == "tiny" else max(1, len(some) // 5)
            assert differing <= allowed, f"the loop ({name}, {state}) found {differing} other texts"
            slow = median(options.runs, lambda loop=loop: loop(some), nothing) / len(some)
            ratios[f"text_{name}_{state}"] = round(slow * len(clean) / fast[state], 1)
            ours = fast[state] / len(clean)
            print(
                f"{name:10} {state}: {slow * 1e3:8.2f} ms a text against {ours * 1e3:6.2f} ms"
                + (f", {differing} of {len(some)} texts differ by rounding" if differing else ""),
                flush=True,
            )
    forget()
    return ratios


def long_words() -> None:
    """What a word of many pieces costs: its candidates are never the full product of those of its pieces."""
    source = MaskedLM()
    word = "xylophonically"
    source.propose([f"a photo of a {word}"])
    forget()
    seconds = median(5, lambda: source.propose([f"a photo of a {word} circle"]), forget)
    from transformers import AutoTokenizer

    pieces = AutoTokenizer.from_pretrained(EMBEDDED).tokenize(word)
    print(json.dumps({"pieces": len(pieces), "milliseconds": round(1e3 * seconds, 1)}))


def memory(options: argparse.Namespace) -> None:
    """Attacks once and prints by how much the process grew, in megabytes."""
    with tempfile.TemporaryDirectory() as folder:
        model = model_of(options.model, Path(folder))
        clean = texts_of(options.texts[0])
        attack = Substitute(MaskedLM())
        attack(model.encode_text, clean[:8])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        attack(model.encode_text, clean)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps([before // 1024, after // 1024]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--model", choices=["tiny", "fresh", "b32"], default="tiny", help="all but tiny are random")
    parser.add_argument("--texts", type=int, nargs="+", default=[120])
    parser.add_argument("--sample", type=int, default=None, help="so many texts for the loop; all, if not given")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cold", action="store_true", help="leave the warm runs out")
    parser.add_argument("--long", action="store_true", help="measure a word of many pieces instead")
    parser.add_argument("--memory", action="store_true", help="measure peak memory too, in processes of their own")
    parser.add_argument("--grown", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.long:
        long_words()
        return
    if options.grown:
        memory(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        model = model_of(options.model, Path(folder))
        for count in options.texts:
            ratios = compare(model, texts_of(count), options)
            print(json.dumps({"texts": count} | ratios), flush=True)
            if options.memory:
                command = [sys.executable, __file__, "--grown", "--model", options.model, "--texts", str(count)]
                answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                before, after = json.loads(answer.splitlines()[-1])
                print(f"the process grew from {before} to {after} MB", flush=True)


if __name__ == "__main__":
    main()
