"""The questions of the demo: chat prompts of mixed length, priority and output length."""

from dataclasses import dataclass

from ingine.contract.keys import Priority

REPORT = """\
The harbour of Vessen was built in 1871 for herring boats. When the herring went elsewhere in 1902,
the town turned to shipbuilding, and by 1930 its two yards employed four thousand people. The larger
one closed in 1978, the smaller one builds ferries to this day, since 2015 with electric engines. In
the old sheds there are now a school of music, a bakery and the town's archive. The pier was damaged
in the storm of January 1995, and rebuilt a year later with money that the fishermen's widows' fund
had saved since 1911."""


@dataclass(frozen=True)
class Question:
    text: str
    priority: Priority
    max_tokens: int


def _questions(priority: Priority, max_tokens: int, *texts: str) -> list[Question]:
    return [Question(text, priority, max_tokens) for text in texts]


QUESTIONS = [
    *_questions(
        Priority.LOW,
        160,
        f"Summarise this report in a few sentences.\n\n{REPORT}",
        f"Rewrite this report as a letter to a friend.\n\n{REPORT}",
        f"List the years in this report, and what happened in each.\n\n{REPORT}",
        f"Write five quiz questions about this report, with answers.\n\n{REPORT}",
        "Write a short story about a lighthouse keeper who collects clocks.",
        "Write a story about two robots who learn to bake bread.",
        "Explain how a sailing boat can move against the wind.",
        "Describe a walk through a market in the early morning.",
    ),
    *_questions(
        Priority.NORMAL,
        112,
        "Explain photosynthesis to a ten-year-old.",
        "How does a refrigerator work?",
        "Give me a simple recipe for pancakes.",
        "What should I pack for a weekend in the mountains?",
        "Why is the sky blue, and why are sunsets red?",
        "Tell me about the history of the printing press.",
        "How do vaccines work?",
        "What is the difference between a virus and a bacterium?",
        "How can I learn to play the guitar as an adult?",
        "Explain what an inflation rate is.",
        "Suggest a daily routine for somebody who works from home.",
        "What makes a good cup of coffee?",
        "Why do cats purr?",
        "How is glass made?",
        "Describe the water cycle.",
        "What does a conductor of an orchestra do?",
        "How do bees find their way home?",
        "Write a polite letter that asks a neighbour to play music more quietly.",
    ),
    *_questions(
        Priority.HIGH,
        64,
        "What is the capital of France, and what is it known for?",
        "Write a haiku about rain.",
        "Translate 'good morning' into French, Spanish and German.",
        "Name three planets that are larger than the Earth.",
        "What is 12 times 12?",
        "Give me one tip for better sleep.",
        "Who wrote Romeo and Juliet?",
        "Name a fruit for each colour of the rainbow.",
        "What is the boiling point of water?",
        "Say something kind to somebody who has had a long day.",
    ),
]
