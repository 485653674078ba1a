"""A run as people see it: checkpoints, its folder, progress; settings from files."""

from __future__ import annotations

from faults.bug import Bug, InFile

_CHECKPOINT = [
    Bug("checkpoints hold frozen weights too", "for name, p in model.named_parameters() if p.requires_grad}\n\n\ndef load",
        "for name, p in model.named_parameters()}\n\n\ndef load", "test_lora test_ppo_trainer test_run_directory"),
    Bug("a checkpoint of another model is loaded", "if mine.keys() != state.keys() or any(mine[n].shape != state[n].shape for n in mine):", "if False:",
        "test_lora test_ppo_trainer test_sft test_engine"),
    Bug("Python's random state is not restored", '    random.setstate(states["python"])\n', "", "test_evaluation"),
    Bug("NumPy's random state is not restored", '    numpy.random.set_state(states["numpy"])\n', "", "test_evaluation"),
    Bug("torch's random state is not restored", '    torch.set_rng_state(states["torch"].cpu())\n', "", "test_evaluation"),
    Bug("a damaged checkpoint is a traceback", "(OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError)", "ZeroDivisionError",
        "test_run_directory test_ppo_trainer test_reward_trainer"),
]  # fmt: skip

_DIRECTORY = [
    Bug("a run is resumed with other settings", "if before.get(key) != now.get(key)", "if False"),
    Bug("a longer run may not be resumed", '    "steps",\n', "", "test_run_directory test_ppo_trainer"),
    Bug("a used folder is written into", "if path.is_dir() and any(path.iterdir()):", "if False:"),
    Bug("NaN stands in metrics.jsonl", "value if math.isfinite(value) else None", "value"),
    Bug("the checkpoint's own step is forgotten too", 'json.loads(line)["step"] <= step', 'json.loads(line)["step"] < step'),
    Bug("a torn line stays", 'if line.endswith("\\n") and json', "if json"),
    Bug("the oldest checkpoint is the newest", "return max(found, default=None)", "return min(found, default=None)", "test_run_directory test_sft test_reward_trainer"),
    Bug("a folder that failed appears", "        yield partial\n        if path.exists():", "        try:\n            yield partial\n        finally:\n            partial.rename(path)\n        if False:"),
    Bug("what was there is lost where a folder fails", "        yield partial\n        if path", "        shutil.rmtree(path, ignore_errors=True)\n        yield partial\n        if path"),
    Bug("messages tell secrets of changed URLs", "then, today = map(flatten, map(shown_settings, both))", "then, today = map(flatten, both)",
        "test_run_directory test_trackers"),
]  # fmt: skip

_PROGRESS = [
    Bug("repeated phases do not add up", "self.times[key] = self.times.get(key, 0.0) + time", "self.times[key] = time"),
    Bug("phase times are kept for the next step", "        self.times = {}\n        if self._live", "        if self._live"),
    Bug("track loses the last item", "for done, item in enumerate(items, start=1):", "for done, item in enumerate(items[:-1], start=1):"),
]  # fmt: skip

_CONFIG_IO = [
    Bug("the file goes before overrides", "_set(data, *_parse_override(override))", "data.setdefault(_parse_override(override)[0][0], {}) or _set(data, *_parse_override(override))"),
    Bug("defaults go before the file", "data = _over(defaults or {}, _read_file(file) if file is not None else {})",
        "data = _over(_read_file(file) if file is not None else {}, dict(defaults or {}))", "test_cli test_config"),
    Bug("1e-5 is text", '_EXPONENT = re.compile(r"^[-+]?[0-9][0-9_]*(?:\\.[0-9]*)?[eE][-+]?[0-9]+$")', '_EXPONENT = re.compile(r"^never$")'),
    Bug("keys given twice are taken", "            if key in seen:", "            if False:"),
    Bug("unknown keys are passed over", 'problems.append(f"{key}: unknown key{_nearest(key, known)}")', "pass"),
    Bug("URLs are shown with their password", 'host = parts.netloc.rpartition("@")[2]', "host = parts.netloc", "test_http_reward test_trackers test_config"),
    Bug("URLs are shown with their query", 'query="…" if parts.query else ""', "query=parts.query", "test_http_reward test_trackers test_config"),
    Bug("texts are numbers", "validate_json(json.dumps(data, default=str), strict=True)", "validate_json(json.dumps(data, default=str))"),
]  # fmt: skip

_TRACKERS = [
    Bug("a tracker that fails stops the run", "            except Exception as error:  # as above", "            except ZeroDivisionError as error:  # as above"),
    Bug("a resumed run's repeated points stay", "purge = start + 1 if start else 0", "purge = 0"),
]  # fmt: skip

FILES = [
    InFile("ppo_engine/run/checkpoint.py", "test_run_directory", _CHECKPOINT),
    InFile("ppo_engine/run/directory.py", "test_run_directory", _DIRECTORY),
    InFile("ppo_engine/run/progress.py", "test_progress", _PROGRESS),
    InFile("ppo_engine/config_io.py", "test_config", _CONFIG_IO),
    InFile("ppo_engine/run/trackers.py", "test_trackers", _TRACKERS),
]
