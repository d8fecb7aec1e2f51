# SPDX-License-Identifier: Apache-2.0
"""Real English for the demo, the notebook and the tests: CPython's own help topics, and a tokenizer trained on them.

Nothing is downloaded: the text ships with Python, the tokenizer is trained in a fraction of a second.
"""

from collections.abc import Sequence
from itertools import chain, cycle, islice
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .errors import ArgumentError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def english() -> list[str]:
    """The language topics of Python's ``help()``: 79 documents, 465,000 characters in Python 3.11.

    Returns:
        One string per topic, in the order of the topics' names.

    Example:
        >>> any("coroutine" in document for document in english())
        True
    """
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def train_tokenizer(documents: Sequence[str], vocabulary: int = 8192) -> "Tokenizer":
    """Train a byte-pair tokenizer; equal documents give an equal tokenizer.

    Args:
        documents: the text to train on.
        vocabulary: tokens at most. ``<pad>`` is 0 and ``</s>``, which closes every encoded text, is 1, as in T5.

    Returns:
        A ``tokenizers.Tokenizer``. Any text can be encoded (bytes are the alphabet) and decoded again.

    Raises:
        ArgumentError: the vocabulary has no room for the 256 bytes and the two special tokens.

    Example:
        >>> tokenizer = train_tokenizer(["a coroutine is a function"])
        >>> tokenizer.decode(tokenizer.encode("a coroutine").ids)
        'a coroutine'
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "</s>"]
    if vocabulary < len(alphabet) + len(special):
        raise ArgumentError(f"vocabulary: expected at least {len(alphabet) + len(special)}, got {vocabulary}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        documents,
        trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def sequences(documents: Sequence[Sequence[int]], count: int, length: int) -> NDArray[np.int64]:
    """Cut encoded documents into full sequences, as for pre-training: one document after the other, no padding.

    Args:
        documents: token ids of each document.
        count: number of sequences wanted. When the documents end, they start again.
        length: tokens in a sequence.

    Returns:
        ``[count, length]`` int64.

    Raises:
        ArgumentError: there is not one token, or ``count`` or ``length`` is below 1.

    Example:
        >>> sequences([[5, 6, 1], [7, 1]], count=2, length=3).tolist()
        [[5, 6, 1], [7, 1, 5]]
    """
    if not any(len(document) for document in documents):
        raise ArgumentError("documents: expected at least one token, got none")
    if count < 1 or length < 1:
        raise ArgumentError(f"count, length: expected at least 1, got {count}, {length}")
    endless = chain.from_iterable(cycle(documents))
    return np.fromiter(islice(endless, count * length), np.int64, count * length).reshape(count, length)
