"""The workload of every mode: prompts of mixed length, each with a fixed number of greedy tokens."""

from ingine.engine.text.tokenizer import Tokenizer
from ingine.sampling_params import SamplingParams

NUM_OUTPUT_TOKENS = 64
PROMPT_LENGTHS = (12, 96, 24, 65, 48, 17, 33, 30)
"""Prompt lengths in tokens, used in turns; about 41 on average."""

SAMPLING = SamplingParams(temperature=0, max_tokens=NUM_OUTPUT_TOKENS, ignore_eos=True)

PASSAGE = """\
Maps were drawn long before there was a science of drawing them. The oldest that we have show a valley, a
river and the fields beside it, from above, where nobody could have stood. Sailors kept books instead: so many
days from this cape to that island, with the rising sun on the left. When both were put together on one sheet,
around the year 1300, the coast of the Mediterranean suddenly looked as it does from space, while the inland
was still full of castles drawn from the side. Mountains stayed little molehills for another five centuries,
because nobody knew how to say how high a place was without standing two men with mirrors on two hilltops."""


def make_workload(tokenizer: Tokenizer, num_requests: int) -> list[list[int]]:
    """Prompts of real text as token ids. Each begins at another place, so none is a prefix of another."""
    token_ids = tokenizer.encode(PASSAGE)
    while len(token_ids) < num_requests + max(PROMPT_LENGTHS):
        token_ids = token_ids + token_ids
    lengths = [PROMPT_LENGTHS[index % len(PROMPT_LENGTHS)] for index in range(num_requests)]
    return [token_ids[start : start + length] for start, length in enumerate(lengths)]
