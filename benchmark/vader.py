"""A reward: how positive a text sounds to VADER (Hutto and Gilbert 2014), a lexicon with rules for negation and degree.

    pip install vaderSentiment
    python ppo.py --reward_funcs benchmark/vader.py:positive ...

The compound score of the completion alone, in [-1, 1]. The words of the prompt are not the policy's doing, and they
would move all of its samples along a scale that is flat at its ends, so that a group's rewards differ less.
"""

from functools import cache

from common.run import UserError


def positive(completions: list[str], **_) -> list[float]:
    """Compound score in [-1, 1] of each completion, a text."""
    return [analyzer().polarity_scores(text)["compound"] for text in completions]


@cache
def analyzer():
    """Raises UserError where the package is missing."""
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise UserError("benchmark/vader.py needs a package: pip install vaderSentiment") from error
    return SentimentIntensityAnalyzer()
