"""Trains the small masked language model that text attacks ask for candidates.

The model is a stock `BertForMaskedLM` with a WordPiece vocabulary of its own corpus, trained with the masking
of Devlin et al. 2019 (15 % of the pieces; of these 80 % masked, 10 % random, 10 % kept), so that its
predictions on a sentence without any mask, which is what BERT-Attack reads, mean something. The folder loads
with `AutoModelForMaskedLM` and `AutoTokenizer` alone, and as `MaskedLM('<folder>')` here.

    python scripts/train_masked_lm.py --corpus embedded --out src/crossguard/assets/masked_lm --half
    python scripts/train_masked_lm.py --corpus captions.parquet --vocabulary 8000 --hidden 128 --out runs/lm

Where the corpus knows synonyms (the generated scenes do), half of the random noise is a synonym of the word
that it hides: the model then answers an unmasked "red" with "crimson" first and with other colors after it.
Sentences alone cannot teach that, since every color stands in the same places.
"""

from __future__ import annotations

import argparse
import itertools
import random
import re
import string
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import WordPiece
from transformers import BertConfig, BertForMaskedLM, BertTokenizer

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def main() -> None:
    options = arguments()
    torch.manual_seed(options.seed)
    random.seed(options.seed)
    if options.threads:
        torch.set_num_threads(options.threads)
    sentences, synonyms = corpus(options.corpus, options.count)
    extra = [line.strip() for file in options.extra for line in Path(file).read_text("utf-8").splitlines()]
    extra = [line for line in extra if line]
    tokenizer = train_tokenizer(sentences, extra, options.vocabulary, options.length)
    sentences = sentences + extra * options.repeat
    print(f"{len(sentences)} sentences, {len(tokenizer)} pieces")
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.hidden // 32),
        intermediate_size=4 * options.hidden,
        max_position_embeddings=options.length,
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertForMaskedLM(config)
    perplexity = train(model, tokenizer, sentences, synonym_table(synonyms, tokenizer), options)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    (model.half() if options.half else model).save_pretrained(out)
    tokenizer.save_pretrained(out)
    card(out, options, len(sentences), len(tokenizer), perplexity)
    size = sum(file.stat().st_size for file in out.iterdir()) / 1e6
    print(f"wrote {out}: {size:.2f} MB")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--corpus", default="embedded", help="'embedded' or a parquet file with a column 'caption'")
    parser.add_argument("--count", type=int, default=20000, help="sentences drawn from the embedded corpus")
    parser.add_argument(
        "--extra",
        action="append",
        default=[],
        help="more sentences, one a line; their words become pieces",
    )
    parser.add_argument("--repeat", type=int, default=1, help="how often the sentences of --extra are seen per epoch")
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--vocabulary", type=int, default=1000)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--length", type=int, default=64, help="the longest sentence, in pieces")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--half", action="store_true", help="save the weights in half precision")
    parser.add_argument("--minutes", type=float, default=0.0, help="stop training after this long, if not 0")
    return parser.parse_args()


def corpus(source: str, count: int) -> tuple[list[str], dict[str, tuple[str, ...]]]:
    """The sentences, and the synonyms of their words where the corpus knows them."""
    if source == "embedded":
        from crossguard.datasets.grammar import ALIASES, sentences

        drawn = list(sentences("train", count))
        media = [text for text in drawn if re.match(r"an? \w+ of ", text)]
        return drawn + [f"this is {text}" for text in media[::3]], dict(ALIASES)  # as zero-shot prompts begin
    import pyarrow.parquet as pq

    captions = pq.read_table(source, columns=["caption"])["caption"].to_pylist()
    return [text for text in captions if text], {}


def synonym_table(synonyms: dict[str, tuple[str, ...]], tokenizer: BertTokenizer) -> torch.Tensor:
    """For each piece the pieces that mean the same, padded by repetition; the piece itself, where there are none."""
    vocabulary = tokenizer.get_vocab()
    alike: list[list[int]] = [[] for _ in range(len(vocabulary))]
    for word, others in synonyms.items():
        group = [vocabulary[name] for name in (word, *others) if name in vocabulary]
        for first, second in itertools.permutations(group, 2):
            alike[first].append(second)
    width = max(1, *(len(group) for group in alike))
    rows = [list(itertools.islice(itertools.cycle(group or [i]), width)) for i, group in enumerate(alike)]
    return torch.tensor(rows)


def train_tokenizer(sentences: list[str], extra: list[str], size: int, length: int) -> BertTokenizer:
    """A WordPiece tokenizer of the corpus; every word of `extra` is one piece, and any ASCII word can be spelled."""
    tokenizer = Tokenizer(WordPiece(unk_token="[UNK]"))  # type: ignore[call-arg]
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    split = pre_tokenizers.BertPreTokenizer()
    whole = Counter(word for line in extra for word, _ in split.pre_tokenize_str(line.lower()))
    trainer = trainers.WordPieceTrainer(
        vocab_size=max(size - len(whole), 300), special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(sentences + extra, trainer)
    vocabulary = tokenizer.get_vocab()
    letters = string.ascii_lowercase + string.digits
    for word in [*sorted(whole), *letters, *string.punctuation, *("##" + letter for letter in letters)]:
        vocabulary.setdefault(word, len(vocabulary))
    tokenizer.model = WordPiece(vocab=vocabulary, unk_token="[UNK]")  # type: ignore[call-arg]
    tokenizer.decoder = decoders.WordPiece()
    ends = [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=ends
    )
    return BertTokenizer(tokenizer_object=tokenizer, model_max_length=length)


def train(
    model: BertForMaskedLM,
    tokenizer: BertTokenizer,
    sentences: list[str],
    synonyms: torch.Tensor,
    options: Any,
) -> float:
    """Adam with a linear warm-up and decay; returns the perplexity of the last masked pieces."""
    encodings = tokenizer.backend_tokenizer.encode_batch(sentences)
    rows = [torch.tensor(encoding.ids[: options.length], dtype=torch.int32) for encoding in encodings]
    rows.sort(key=len)  # batches of like length waste no padding
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, weight_decay=0.01)
    start, mean, order = time.monotonic(), 0.0, []
    budget = options.minutes * 60.0
    model.train()
    for step in range(options.steps):
        done = step / options.steps
        if budget:
            done = max(done, (time.monotonic() - start) / budget)
        if done >= 1.0:
            break
        for group in optimizer.param_groups:
            group["lr"] = options.rate * min(1.0, (step + 1) / 200, max(1.0 - done, 0.02))
        if not order:
            order = list(range(0, len(rows), options.batch))
            random.shuffle(order)
            random.shuffle(rows)
            rows.sort(key=len)
        first = order.pop()
        batch = torch.nn.utils.rnn.pad_sequence(rows[first : first + options.batch], batch_first=True).long()
        real = batch != 0
        open_ = batch >= len(SPECIAL)
        asked = open_ & (torch.rand(batch.shape) < 0.15)
        if not bool(asked.any()):
            continue
        dice = torch.rand(batch.shape)
        given = batch.clone()
        given[asked & (dice < 0.8)] = SPECIAL.index("[MASK]")
        noise = torch.randint(len(SPECIAL), len(tokenizer), batch.shape)
        given = torch.where(asked & (dice >= 0.8) & (dice < 0.9), noise, given)
        other = torch.randint(synonyms.shape[1], batch.shape)  # half of the noise is a synonym, if there is one
        given = torch.where(asked & (dice >= 0.85) & (dice < 0.9), synonyms[batch, other], given)
        hidden = model.bert(given, attention_mask=real.long()).last_hidden_state
        loss = F.cross_entropy(model.cls(hidden[asked]), batch[asked])  # the head only where it is asked
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mean = loss.item() if step == 0 else 0.99 * mean + 0.01 * loss.item()
        if step % 100 == 0:
            spent = time.monotonic() - start
            print(
                f"step {step}/{options.steps}  perplexity {torch.tensor(mean).exp():.2f}  {spent:.0f} s",
                flush=True,
            )
    print(f"trained for {time.monotonic() - start:.0f} s")
    model.eval()
    return float(torch.tensor(mean).exp())


def card(out: Path, options: Any, sentences: int, pieces: int, perplexity: float) -> None:
    name = "the sentences of the generated scenes" if options.corpus == "embedded" else Path(options.corpus).name
    more = ", and the sentences of " + ", ".join(Path(file).name for file in options.extra) if options.extra else ""
    noise = (
        "; half of the random\n  ones are synonyms, from the list of the corpus" if options.corpus == "embedded" else ""
    )
    (out / "README.md").write_text(
        f"""# Masked language model for text attacks

A small `BertForMaskedLM` ({options.layers} layers, hidden size {options.hidden}, {pieces} WordPiece pieces,
lower-cased), trained from random weights with `scripts/train_masked_lm.py`.

* corpus: {name}{more}; {sentences} sentences
* masking: 15 % of the pieces; of these 80 % masked, 10 % random, 10 % kept (Devlin et al. 2019){noise}
* training: at most {options.steps} steps of {options.batch} sentences, AdamW, seed {options.seed}
* perplexity of masked pieces while training, at the end: {perplexity:.2f}

It proposes replacement words to `Substitute(MaskedLM(...))` and is good for nothing else: it knows the words
of its corpus only, and its sentences are short.
""",
        "utf-8",
    )


if __name__ == "__main__":
    main()
