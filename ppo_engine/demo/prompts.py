"""The demo's prompts: short and neutral, so that the tone of an answer is the model's choice."""

from __future__ import annotations

from ppo_engine.text.prompt import Prompt

_TRAINING = """
rain; a chair; the city bus; breakfast; the moon; a door; winter; the library; a bicycle; the office
a river; the neighbor; shoes; a map; the kitchen; a letter; the harbor; a train; school; the garden
a clock; bread; the road; a dog; the window; a hat; coffee; the market; a bridge; paper; the sea
an old house; Monday; a pencil; the stairs; a lamp; the weather; a suitcase; lunch; the village
a truck; the telephone; a coat; noise; a spoon; the forest; a photograph; traffic; the attic
a teacher; wool; the elevator; a fence; soup; the airport; a notebook; sand; the roof; a farmer
glass; the newspaper; a mirror; a parking lot; the evening; a horse; salt; the basement; a radio
a bench; wood; the corridor; a cat; the post office; a ladder; iron; the hill; a driver; a cup
the supermarket; fog; a blanket; the dentist; a tunnel; rice; the factory; a ticket; a pond
the laundry; a neighbor's car; dust; the balcony; a screwdriver; the suburbs; an onion; a waiter
a stone
"""

_HELD_OUT = """
snow; a table; the subway; dinner; the sun; a gate; autumn; the museum; a boat; the hospital
a lake; the landlord; gloves; a calendar; the bathroom; a postcard; the beach; an airplane; homework
the park; a watch; cheese; the highway; a bird; the curtain; a scarf; tea; the bakery; a tower
cardboard; the desert; a new apartment; Sunday; an eraser; the ceiling; a candle; the wind; a box
a sandwich; the countryside; a van; the computer; a shirt; silence; a fork; the jungle; a painting
a queue; the garage; a student; cotton; the escalator; a wall; stew; the bus station; a diary
clay; the chimney; a fisherman; plastic; the magazine; a pillow; the morning; a cow
"""


def _topics(text: str) -> list[str]:
    return [topic.strip() for topic in text.replace("\n", ";").split(";") if topic.strip()]


TRAINING_TOPICS = _topics(_TRAINING)
HELD_OUT_TOPICS = _topics(_HELD_OUT)


def prompt_about(topic: str, tone: str = "", chat: bool = True) -> Prompt:
    """ "Write one sentence about …", or "Write one joyful sentence about …" for a tone; as a chat
    message, or as plain text for models without a chat template."""
    request = (
        f"Write one {tone} sentence about {topic}."
        if tone
        else (f"Write one sentence about {topic}.")
    )
    return [{"role": "user", "content": request}] if chat else request + "\n"
