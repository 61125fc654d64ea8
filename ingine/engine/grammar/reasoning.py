"""Where the reasoning of a constrained output begins and ends: its grammar holds from the end on."""

from typing import NamedTuple

from ingine.engine.grammar.vocabulary import GrammarVocabulary
from ingine.engine.message_format import MessageFormat
from ingine.errors import ErrorCode, InvalidRequest


class ReasoningTokens(NamedTuple):
    """The tokens between which a model reasons before it answers.

    Reasoning has begun with the prompt, or begins with the first output token if that is `opening`. It ends
    with `closing`.
    """

    opening: int | None
    """None: the opening tag is not one token, so an output cannot begin with it."""
    closing: int
    has_begun: bool
    """The prompt ends within the reasoning."""


def reasoning_tokens(format: MessageFormat | None, vocabulary: GrammarVocabulary) -> ReasoningTokens | None:
    """Return the tokens of a request's reasoning tags. None: the grammar holds from the first token on.

    A closing tag of several tokens has no place where the grammar can begin, since the tokens before its last
    one may go on otherwise. Raises InvalidRequest (UNSUPPORTED_GRAMMAR) if the prompt ends within such
    reasoning.
    """
    if format is None or format.reasoning is None:
        return None
    opening, closing = map(vocabulary.token_id, format.reasoning)
    if closing is not None:
        return ReasoningTokens(opening, closing, format.starts_in_reasoning)
    if format.starts_in_reasoning:
        message = (
            f"structured_outputs: the prompt ends within the reasoning, and {format.reasoning.closing!r} is "
            "not one token of this model: there is no place where the grammar can begin"
        )
        raise InvalidRequest(ErrorCode.UNSUPPORTED_GRAMMAR, message)
    return None
