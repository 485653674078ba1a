"""The demo's prompts: short and neutral, so that the tone of an answer is the model's choice."""

from __future__ import annotations

from ppo_engine.text import Message

_SYSTEM = "Answer in one sentence."

_TOPICS = """
rain; a chair; the city bus; breakfast; the moon; a door; winter; the library; a bicycle; the office
a river; the neighbor; shoes; a map; the kitchen; a letter; the harbor; a train; school; the garden
a clock; bread; the road; a dog; the window; a hat; coffee; the market; a bridge; paper; the sea
an old house; Monday; a pencil; the stairs; a lamp; the weather; a suitcase; lunch; the village
a truck; the telephone; a coat; noise; a spoon; the forest; a photograph; traffic; the attic
a teacher; wool; the elevator; a fence; soup; the airport; a notebook; sand; the roof; a farmer
glass; the newspaper; a mirror; a parking lot; the evening; a horse; salt; the basement; a radio
a bench; wood; the corridor; a cat; the post office; a ladder; iron; the hill; a driver; a cup
the supermarket; fog; a blanket; the dentist; a tunnel; rice; the factory; a ticket; a pond
the laundry; a neighbor's car; dust; the balcony; a screwdriver; the suburbs; an onion; a waiter; a stone
"""

_HELD_OUT_TOPICS = """
snow; a table; the subway; dinner; the sun; a gate; autumn; the museum; a boat; the hospital
a lake; the landlord; gloves; a calendar; the bathroom; a postcard; the beach; an airplane; homework
the park; a watch; cheese; the highway; a bird; the curtain; a scarf; tea; the bakery; a tower
cardboard; the desert; a new apartment; Sunday; an eraser; the ceiling; a candle; the wind; a box
a sandwich; the countryside; a van; the computer; a shirt; silence; a fork; the jungle; a painting
a queue; the garage; a student; cotton; the escalator; a wall; stew; the bus station; a diary
clay; the chimney; a fisherman; plastic; the magazine; a pillow; the morning; a cow
"""


def _messages(topics: str) -> list[list[Message]]:
    names = [name.strip() for name in topics.replace("\n", ";").split(";") if name.strip()]
    return [
        [
            {"role": "system", "content": _SYSTEM},
            {"role": "user", "content": f"Write one sentence about {name}."},
        ]
        for name in names
    ]


TRAIN_PROMPTS = _messages(_TOPICS)
HELD_OUT_PROMPTS = _messages(_HELD_OUT_TOPICS)
