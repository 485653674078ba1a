"""Rewards: what scores a response, and what becomes of the score."""

from __future__ import annotations

from faults.bug import Bug, InFile

_SHAPING = [
    Bug("the length penalty before the normalization",
        "    if normalizer is not None:\n        scores = normalizer(scores, learn=learn)",
        "    if normalizer is not None:\n        scores = normalizer(scores - length_penalty(rollout.lengths, config), learn=learn)"),
    Bug("no length penalty", "return scores - length_penalty(rollout.lengths, config)", "return scores"),
    Bug("a length reward", "return scores - length_penalty(rollout.lengths, config)",
        "return scores + length_penalty(rollout.lengths, config)"),
    Bug("the length penalty counts the environment's tokens", "length_penalty(rollout.lengths, config)\n\n\ndef",
        "length_penalty(rollout.response_mask.sum(1), config)\n\n\ndef", "test_score_shaping test_conversation"),
    Bug("the length penalty of short responses is negative", ".clamp_min(0).float()", ".float()"),
    Bug("the length penalty begins at 0", "(lengths - config.length_penalty_from)", "lengths"),
    Bug("finished responses are penalized", "torch.where(finished, scores, changed)", "torch.where(finished, changed, scores)"),
    Bug("missing EOS is not looked at", "scores = _apply_missing_eos(scores, rollout.finished, config)", "pass"),
    Bug("missing EOS before the normalization",
        "    if normalizer is not None:\n        scores = normalizer(scores, learn=learn)\n    scores = _apply_missing_eos(scores, rollout.finished, config)",
        "    scores = _apply_missing_eos(scores, rollout.finished, config)\n    if normalizer is not None:\n        scores = normalizer(scores, learn=learn)"),
    Bug("the missing-EOS score is added", "torch.full_like(scores, config.missing_eos_score)", "scores + config.missing_eos_score"),
    Bug("the missing-EOS penalty is a gift", "changed = scores - config.missing_eos_penalty", "changed = scores + config.missing_eos_penalty"),
    Bug("the normalization never ends", "if learn and self.count < self.responses:", "if learn:"),
    Bug("the normalization learns where it is not to", "if learn and self.count < self.responses:", "if self.count < self.responses:",
        "test_score_shaping test_evaluation"),
    Bug("scores are scaled and not shifted", "(scores - self.mean) /", "scores /"),
    Bug("scores are shifted and not scaled", "(std if std > 1e-6 else 1.0)", "1.0"),
    Bug("equal scores are divided by 0", "(std if std > 1e-6 else 1.0)", "(std or 1e-12)"),
    Bug("the scale is unbiased", "math.sqrt(self.m2 / max(self.count, 1))", "math.sqrt(self.m2 / max(self.count - 1, 1))"),
    Bug("rollouts are merged without the shift of their means", "        self.m2 += shift**2 * self.count * scores.numel() / total\n", ""),
    Bug("the mean is that of the last rollout", "self.mean += shift * scores.numel() / total", "self.mean += shift"),
    Bug("the checkpoint loses the count", 'int(state["count"])', "0"),
]  # fmt: skip

_WEIGHTED = [
    Bug("weights are ignored", "self.weights[name] * scores for name, scores", "scores for name, scores"),
    Bug("the total is a mean", "for name, scores in each.items()]).sum(0)", "for name, scores in each.items()]).mean(0)"),
    Bug("weights in another order", "dict(zip(by_name, weights or", "dict(zip(list(by_name)[::-1], weights or"),
    Bug("a reward model of the policy's tokenizer reads text", "if name in self.by_tokens:", "if False:"),
    Bug("a reward model of another tokenizer reads tokens", "if isinstance(reward, RewardModel) and same_tokenizer(reward.tokenizer, tokenizer)",
        "if isinstance(reward, RewardModel)"),
    Bug("every response counts as finished", "rollout.finished.tolist(), rollout.columns", "[True] * len(rollout), rollout.columns"),
    Bug("columns do not reach a reward function", "rollout.finished.tolist(), rollout.columns", "rollout.finished.tolist(), {}",
        "test_ppo_trainer test_reward_function test_rewards"),
    Bug("one reward has metrics of its own", "for name, scores in each.items() if len(each) > 1 else ():", "for name, scores in each.items():"),
    Bug("the deviation of rewards is unbiased", "float(scores.std(unbiased=False))", "float(scores.std())"),
    Bug("endpoints have default settings", "HTTPReward(given.url, http or RewardEndpointConfig())", "HTTPReward(given.url, RewardEndpointConfig())"),
    Bug("too few weights are taken", "if weights is not None and len(weights) != len(by_name):", "if weights is not None and len(weights) < 1:"),
    Bug("the configuration goes before what is given", "if given is not None:\n        rewards", "if given is not None and not configured_sources(config):\n        rewards",
        "test_rewards test_ppo_trainer"),
]  # fmt: skip

_SOURCES = [
    Bug("several kinds of reward are taken", "if len(given) > 1:", "if False:"),
    Bug("a source of two kinds is taken", "if len(kinds) != 1:", "if len(kinds) < 1:"),
    Bug("a URL is a function", 'text.startswith(("http://", "https://"))', 'text.startswith("https://")'),
    Bug("a folder with a colon is a function", 'if ":" in text and not Path(text).exists():', 'if ":" in text:'),
    Bug("names may repeat", "if wanted.count(name) > 1:", "if False:"),
    Bug("repeated functions share a name", 'f"{stem}_{n}" if n > 1 else stem', 'f"{stem}_{n}"'),
    Bug("objects given in Python are recorded as the settings' rewards", "        rewards = []\n    sources", "        return config\n    sources"),
]  # fmt: skip

_MODEL = [
    Bug("scores in the order of lengths", "scores[picked] = sequence_scores(", "scores[start : start + len(picked)] = sequence_scores("),
    Bug("every response ends", "self.max_tokens, ended)", "self.max_tokens, True)"),
    Bug("no limit of tokens", "encode_dialogue(self.tokenizer, prompt, response, self.max_tokens, ended)",
        "encode_dialogue(self.tokenizer, prompt, response, 10**9, ended)"),
    Bug("tokens lose their end to the limit", "row[-self.max_tokens :] for row", "row[: self.max_tokens] for row"),
    Bug("the turns of a conversation are one text", "if said and not isinstance(prompt, str):", "if False:", "test_conversation"),
    Bug("padding is read as text", "rows = [row[keep].tolist() for row, keep", "rows = [row.tolist() for row, keep"),
    Bug("a reward model is trained", ".requires_grad_(False)", "", "test_reward_model test_rewards test_value_model"),
    Bug("other vocabularies are the same tokenizer", "a.get_vocab() == b.get_vocab()\n        and", "True\n        and"),
    Bug("other templates are the same tokenizer", "        and a.chat_template == b.chat_template\n", ""),
    Bug("other ends are the same tokenizer", "        and a.eos_token_id == b.eos_token_id\n", ""),
    Bug("other pre-tokenizers are the same tokenizer", '        and a(_PROBE_TEXT)["input_ids"] == b(_PROBE_TEXT)["input_ids"]\n', ""),
    Bug("the pad token of a reward model may be EOS", "        models.separate_pad_from_eos(tokenizer)\n", ""),
    Bug("a language model is a reward model", "read_value_model(path, require_head=True)", "read_value_model(path)"),
]  # fmt: skip

_FUNCTION = [
    Bug("the number of scores is not checked", "if len(values) != count:", "if False:"),
    Bug("NaN is a score", "isinstance(number, int | float) and math.isfinite(number)", "isinstance(number, int | float)"),
    Bug("scores beyond fp32 are taken", "if not valid or abs(number) > torch.finfo(torch.float32).max:", "if not valid:"),
]  # fmt: skip

_USER_FUNCTIONS = [
    Bug("columns that are not asked for are passed", "return column in self._named or (self._takes_all and column not in self._taken)",
        "return True"),
    Bug("**columns gets nothing", "return column in self._named or (self._takes_all and column not in self._taken)",
        "return column in self._named"),
    Bug("a missing column is no mistake", "if absent:", "if False:"),
    Bug("async functions are not awaited", "return _awaited(result) if inspect.isawaitable(result) else result", "return result"),
    Bug("each async batch has a loop of its own", "@functools.cache\ndef _loop()", "def _loop()"),
    Bug("a changed file is not read again", "return _run_file(path, path.stat().st_mtime_ns, source)", "return _run_file(path, 0, source)"),
    Bug("a file is run for each function", "@functools.cache\ndef _run_file", "def _run_file"),
    Bug("a parameter with a default is required", "self.required = [p.name for p in rest if p.default is p.empty]",
        "self.required = [p.name for p in rest]"),
]  # fmt: skip

_HTTP = [
    Bug("one request whatever batch_size says", "size = self.settings.batch_size or max(len(responses), 1)", "size = max(len(responses), 1)"),
    Bug("every request has the first responses", '"responses": list(responses[part]),', '"responses": list(responses[: len(responses[part])]),'),
    Bug("every request has all columns", "{name: list(column[part]) for name, column in columns.items()}", "{name: list(column) for name, column in columns.items()}"),
    Bug("finished is left out", '                "finished": list(finished[part]),\n', ""),
    Bug("the key rewards is not known", 'answer.get("scores", answer.get("rewards", answer))', 'answer.get("scores", answer)'),
    Bug("requests are not repeated", "total=_ATTEMPTS - 1,", "total=0,"),
    Bug("a busy server is not asked again", "status_forcelist=(429, *range(500, 600)),", "status_forcelist=(*range(500, 600),),"),
    Bug("a client's mistake is repeated", "status_forcelist=(429, *range(500, 600)),", "status_forcelist=range(400, 600),"),
    Bug("POST is not repeated", 'allowed_methods=("POST",),', 'allowed_methods=("GET",),'),
    Bug("a server may ask for hours", "            retry_after_max=_LONGEST_WAIT,\n", ""),
    Bug("redirects are followed", "allow_redirects=False,", "allow_redirects=True,"),
    Bug("the timeout is ignored", "timeout=self.settings.timeout,", "timeout=60.0,"),
    Bug("any status is an answer", "if response.status_code != requests.codes.ok:", "if False:"),
    Bug("messages tell the password", 'self._shown = f"The reward endpoint {shown_url(url)}"', 'self._shown = f"The reward endpoint {url}"'),
    Bug("columns with NaN are sent", "json.dumps(request, allow_nan=False)", "json.dumps(request)"),
]  # fmt: skip

_BEST_OF_N = [
    Bug("the weights of subsets with replacement", "math.comb(below, n - 1) / subsets", "math.comb(below + 1, n - 1) / subsets"),
    Bug("the best of all, whatever n", ".sort(dim=1).values[:, n - 1 :]", ".sort(dim=1).values[:, -1:].expand(-1, count - n + 1)"),
    Bug("the worst of n", ".sort(dim=1).values", ".sort(dim=1, descending=True).values"),
    Bug("the bound without its second term", "return math.log(n) - (n - 1) / n", "return math.log(n)"),
]  # fmt: skip

FILES = [
    InFile("ppo_engine/rewards/shaping.py", "test_score_shaping", _SHAPING),
    InFile("ppo_engine/rewards/weighted.py", "test_rewards", _WEIGHTED),
    InFile("ppo_engine/rewards/sources.py", "test_rewards", _SOURCES),
    InFile("ppo_engine/rewards/model.py", "test_reward_model", _MODEL),
    InFile("ppo_engine/rewards/function.py", "test_reward_function", _FUNCTION),
    InFile("ppo_engine/user_functions.py", "test_reward_function", _USER_FUNCTIONS),
    InFile("ppo_engine/rewards/http.py", "test_http_reward", _HTTP),
    InFile("ppo_engine/rewards/best_of_n.py", "test_best_of_n", _BEST_OF_N),
]
