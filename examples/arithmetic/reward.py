"""The reward of this example."""

import re


def reward(responses, answer):  # `answer` is a column of the data
    """1 where the last number in a response is the right answer, else 0."""
    numbers = [re.findall(r"\d+", response) for response in responses]
    return [float(found[-1:] == [right]) for found, right in zip(numbers, answer, strict=True)]
