"""The Hugging Face hub, asked whether it answers before anything is loaded from it: its own client
asks six times for each file, and waits 23 seconds in between, also for models in the cache."""

from __future__ import annotations

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME

from ppo_engine.errors import UserError
from ppo_engine.messages import first_line, nearest_path

_set_offline = False  # whether HF_HUB_OFFLINE is on by this module, not by the user


def silence(name: str) -> str:
    """Why the hub does not answer when it is asked once for the model `name`, for as long as
    HF_HUB_ETAG_TIMEOUT says; empty where it does, whatever it says."""
    try:
        get_hf_file_metadata(hf_hub_url(name, CONFIG_NAME))
    except HfHubHTTPError:  # such as "not found"
        return ""
    except Exception as error:  # of the library that asks, which is another by the hub's version
        return first_line(error) or type(error).__name__
    return ""


def check_name(name: str) -> None:
    """Raise a UserError for a `name`, of no folder here, that no model can have, or that is not in
    the cache while the hub does not answer. With what is in the cache the process goes on offline,
    as with HF_HUB_OFFLINE=1."""
    global _set_offline
    problem = f"Could not load a model from {name!r}: there is no such folder"
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise UserError(
            f"{problem}, and a Hugging Face model is called NAME or OWNER/NAME.{nearest_path(name)}"
        ) from None
    files = (CONFIG_NAME, ADAPTER_CONFIG_NAME)
    cached = any(isinstance(try_to_load_from_cache(name, file), str) for file in files)
    if _set_offline and not cached:  # the hub may answer by now
        constants.HF_HUB_OFFLINE = _set_offline = False
    reason = silence(name)
    if reason and not cached:
        raise UserError(
            f"{problem}, no model of that name in the cache, and the Hugging Face hub does not "
            f"answer: {reason.rstrip('.')}.{nearest_path(name)}"
        )
    if reason and not constants.HF_HUB_OFFLINE:
        constants.HF_HUB_OFFLINE = _set_offline = True
