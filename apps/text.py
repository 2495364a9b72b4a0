"""All that the page says, in English and Chinese; a key each, places to fill in braces."""

from __future__ import annotations

from typing import Literal

from apps.checkpoints import Checkpoint

Language = Literal["en", "zh"]
LANGUAGES = (("English", "en"), ("中文", "zh"))

WORDS: dict[str, tuple[str, str]] = {
    # the page
    "chat": ("Chat", "对话"),
    "compare": ("Compare", "对比"),
    "progress": ("Progress", "训练进展"),
    "language": ("Language", "语言"),
    "theme": ("Light or dark", "浅色或深色"),
    "password": ("Any user name, and the app's password.", "用户名任意，密码为本应用的密码。"),
    "bad_link": (
        "The link names a checkpoint that is not here, or no seed: the default pair is shown.",
        "链接中的检查点不存在或种子无效：显示默认组合。",
    ),
    # checkpoints and settings
    "checkpoint": ("Checkpoint", "检查点"),
    "final": ("final", "最终模型 (final)"),
    "base": ("base", "基础模型 (base)"),
    "step": ("PPO step {step}", "PPO 第 {step} 步"),
    "refresh": ("Refresh", "刷新"),
    "found": ("{count} checkpoints.", "共 {count} 个检查点。"),
    "settings": ("Settings", "设置"),
    "system": ("System prompt", "系统提示词"),
    "system_hint": ("Empty: none.", "留空表示不使用。"),
    "temperature": ("Temperature", "温度"),
    "temperature_hint": (
        "0 always takes the likeliest token.",
        "0 表示总是选取最可能的词元。",
    ),
    "top_p": ("Top-p", "Top-p"),
    "top_p_hint": (
        "1 keeps every token; less leaves out the unlikely ones.",
        "1 保留所有词元；更小的值会舍去不太可能的词元。",
    ),
    "length": ("Longest answer (tokens)", "回答的最大长度（词元）"),
    "seed": ("Seed", "随机种子"),
    "seed_hint": ("The same seed gives the same answer.", "相同的种子给出相同的回答。"),
    # chat
    "conversation": ("Conversation", "对话内容"),
    "empty": (
        "Ask something. The conversation is kept when you reload the page.",
        "请输入问题。刷新页面后对话仍会保留。",
    ),
    "you": ("You", "你"),
    "model": ("Model", "模型"),
    "message": ("Message", "消息"),
    "message_hint": (
        "Enter sends, Shift+Enter begins a new line",
        "按 Enter 发送，Shift+Enter 换行",
    ),
    "send": ("Send", "发送"),
    "stop": ("Stop", "停止"),
    "retry": ("Retry", "重试"),
    "undo": ("Undo", "撤销"),
    "new": ("New chat", "新对话"),
    "download": ("Download", "下载"),
    "edit": ("Edit", "编辑"),
    "edit_turn": ("Edit turn {turn}", "编辑第 {turn} 条"),
    "edit_text": ("Text of the turn", "该条内容"),
    "edit_user": ("Save and answer again", "保存并重新回答"),
    "edit_model": ("Save", "保存"),
    "cancel": ("Cancel", "取消"),
    "copy": ("Copy", "复制"),
    "copy_turn": ("Copy turn {turn}", "复制第 {turn} 条"),
    "prompt": ("Exact prompt", "完整提示"),
    "prompt_show": ("Show what the model reads", "显示模型实际读到的内容"),
    "prompt_text": ("As the chat template writes it", "按对话模板展开后的文本"),
    "prompt_ids": (
        "{count} tokens of {context}, with their ids",
        "{count} / {context} 个词元及其编号",
    ),
    "prompt_none": ("Write a message first.", "请先输入消息。"),
    # status
    "waiting": ("Waiting for the model …", "正在等待模型……"),
    "writing": ("Writing …", "正在生成……"),
    "tokens": ("{count} tokens", "{count} 个词元"),
    "speed": ("{speed} tokens/s", "{speed} 词元/秒"),
    "first": ("first token after {seconds} s", "首个词元用时 {seconds} 秒"),
    "dropped": (
        "the context is full: the oldest {count} messages are left out",
        "上下文已满：最早的 {count} 条消息未包含在内",
    ),
    "loaded alone": ("loaded", "已加载"),
    "loaded beside": ("loaded beside {labels}", "已与 {labels} 一同加载"),
    "loaded instead of": ("swapped in for {labels}", "已换入，替换 {labels}"),
    "end_length": ("cut at the longest length", "达到最大长度后截断"),
    "end_context": ("cut because the context is full", "上下文已满而截断"),
    "end_stopped": ("stopped", "已停止"),
    "end_time": ("cut because it took too long", "用时过长而截断"),
    "end_error": ("ended by an error", "因错误而中止"),
    "finished": ("The answer is finished.", "回答已完成。"),
    "finished_a": ("Answer A finished.", "回答 A 已完成。"),
    "finished_b": ("Answer B finished.", "回答 B 已完成。"),
    "stopped": ("Stopped.", "已停止。"),
    "empty_answer": ("(an empty answer)", "（空回答）"),
    # compare
    "model_a": ("First model", "第一个模型"),
    "model_b": ("Second model", "第二个模型"),
    "question": ("Prompt for both", "给两个模型的提示"),
    "context": ("Go on from the conversation in Chat", "接着“对话”页中的内容"),
    "blind": ("Blind: hide which is which until you vote", "盲评：投票前不显示各是哪个模型"),
    "colours": ("Colour tokens by probability", "按概率为词元着色"),
    "ask_both": ("Ask both", "同时提问"),
    "answer_a": ("Answer A", "回答 A"),
    "answer_b": ("Answer B", "回答 B"),
    "hidden": ("hidden until you vote", "投票后揭晓"),
    "chosen": ("your choice", "你的选择"),
    "votes": ("Which answer is better?", "哪个回答更好？"),
    "vote_a": ("A is better", "A 更好"),
    "vote_b": ("B is better", "B 更好"),
    "vote_tie": ("Tie", "不相上下"),
    "vote_both_bad": ("Both bad", "都不好"),
    "voted": ("Your vote is saved: {verdict}. A was {a}, B was {b}.",
              "投票已保存：{verdict}。A 是 {a}，B 是 {b}。"),
    "another": ("Another pair", "再来一组"),
    "no_votes": ("No votes on {a} against {b} yet.", "{a} 与 {b} 之间还没有投票。"),
    "tally": (
        "{a} wins {rate} against {b} (95 % interval {low} to {high}). Votes: {wins} won, "
        "{losses} lost, {ties} tied, {both_bad} both bad; {blind} of {count} blind.",
        "{a} 对 {b} 的胜率为 {rate}（95% 区间 {low} 至 {high}）。投票：{wins} 胜，{losses} 负，"
        "{ties} 平，{both_bad} 票都不好；{count} 票中 {blind} 票为盲评。",
    ),
    "tally_bad": (
        "Votes on {a} against {b}: {count}, all of them both bad.",
        "{a} 与 {b} 共 {count} 票，全部为都不好。",
    ),
    "score": ("Reward score", "奖励分"),
    "kl": ("KL to SFT", "与 SFT 的 KL"),
    "nats": ("{kl} nats", "{kl} nat"),
    "answer_length": ("Length", "长度"),
    "scoring": ("Scoring …", "正在评分……"),
    "after_vote": ("Scores appear after your vote.", "投票后显示分数。"),
    "legend": ("Probability of each token under its own model:", "各词元在其模型下的概率："),
    "token_title": (
        "probability {probability}, logprob {logprob}",
        "概率 {probability}，对数概率 {logprob}",
    ),
    "token_sft": ("SFT: logprob {logprob}", "SFT：对数概率 {logprob}"),
    "shortcuts": ("Keyboard", "键盘快捷键"),
    "shortcuts_on": ("Single-key shortcuts", "启用单键快捷键"),
    "shortcuts_text": (
        "1: A is better · 2: B is better · 3: tie · 4: both bad · n: another pair. "
        "They work outside text fields; Escape stops the answers anywhere.",
        "1：A 更好 · 2：B 更好 · 3：不相上下 · 4：都不好 · n：再来一组。"
        "在文本框之外有效；Escape 可随时停止回答。",
    ),
    "link": ("Link to this pair", "此对比的链接"),
    "copy_link": ("Copy the link", "复制链接"),
    # progress
    "progress_intro": (
        "What the report, the votes and the weights say about each checkpoint.",
        "报告、投票与权重对各检查点的反映。",
    ),
    "read": ("Read the numbers again", "重新读取数据"),
    "measure": ("Measure on held-out prompts", "在留出提示上测量"),
    "measuring": ("Measuring {name}: {done} of {of}", "正在测量 {name}：{done} / {of}"),
    "measured": ("Measured.", "测量完成。"),
    "scores_title": ("Scores", "分数"),
    "gold": ("Gold score (the toy world's judge)", "真实分（玩具世界的评判者）"),
    "proxy": ("Proxy score (reward model)", "代理分（奖励模型）"),
    "measured_score": ("Reward score, measured here", "奖励分（在此测量）"),
    "wins_title": ("Win rate of votes against SFT", "投票中对 SFT 的胜率"),
    "votes_series": ("share won, 95 % interval", "胜出比例，95% 区间"),
    "kl_title": ("KL to SFT (nats)", "与 SFT 的 KL（nat）"),
    "kl_report": ("in the report", "报告中"),
    "kl_measured": ("measured here", "在此测量"),
    "distance_title": ("Distance of the weights to SFT, relative", "权重与 SFT 的相对距离"),
    "table": ("The same numbers as a table", "同样数据的表格"),
    "column_gold": ("Gold score", "真实分"),
    "column_proxy": ("Proxy score", "代理分"),
    "column_kl": ("KL", "KL"),
    "column_measured": ("Measured here", "在此测量"),
    "column_wins": ("Wins against SFT", "对 SFT 胜率"),
    "column_votes": ("Votes", "票数"),
    "column_distance": ("Distance to SFT", "与 SFT 的距离"),
    "distances": ("Weights, pair by pair", "逐对比较权重"),
    "column_pair": ("Pair", "组合"),
    "column_l2": ("Distance (L2)", "距离 (L2)"),
    "column_relative": ("Relative", "相对"),
    "column_equal": ("Equal once rounded to bf16", "舍入到 bf16 后相同"),
    "measured_cell": ("{score}, KL {kl}", "{score}，KL {kl}"),
    "interval": ("{mean} ({low} to {high})", "{mean}（{low} 至 {high}）"),
    "nothing": (
        "Nothing to plot yet: these numbers come from the report, from votes and from measuring.",
        "暂无可绘制的数据：数据来自报告、投票和测量。",
    ),
}  # fmt: skip


def say(language: str, key: str, **places: object) -> str:
    """The words of a key; an unknown language is English."""
    text = WORDS[key][language == "zh"]
    return text.format(**places) if places else text


def label_of(language: str, checkpoint: Checkpoint) -> str:
    """A checkpoint's name for people."""
    if language == "zh":
        if checkpoint.step is not None:
            return say(language, "step", step=checkpoint.step)
        if checkpoint.name in ("final", "base"):
            return say(language, checkpoint.name)
    return checkpoint.label


def preferred(accept: str) -> Language:
    """The language of a browser from its Accept-Language header: Chinese where it comes first."""
    ranked = []
    for place, part in enumerate(accept.split(",")):
        name, _, weight = part.strip().partition(";q=")
        try:
            ranked.append((-float(weight or 1), place, name.lower()))
        except ValueError:
            continue
    for _, _, name in sorted(ranked):
        if name.startswith("zh"):
            return "zh"
        if name.startswith("en"):
            return "en"
    return "en"
