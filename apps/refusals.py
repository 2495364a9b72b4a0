"""What the server refuses, in Chinese; scripts and logs have its own, English sentences."""

from __future__ import annotations

import re

OTHERS = "出错了（英文说明）：{sentence}"
"""Around a sentence that is not below: one about files of a model, say."""
PARTS = {
    "a message": "消息",
    "the system prompt": "系统提示词",
    "the temperature": "温度",
    "top-p": "Top-p",
    "the length": "回答长度",
    "the seed": "随机种子",
    "the attempt": "重试次数",
    "the number of prompts": "提示数量",
    "reward model": "奖励模型",
    "the reward model": "奖励模型",
}
"""What may stand in a place of a sentence; names of checkpoints stay."""
SENTENCES = {
    # of a call
    "write a message first": "请先输入消息",
    "{what} may have {most} characters, not {count}; shorten it": (
        "{what}最多 {most} 个字符，现有 {count} 个；请缩短"
    ),
    "{what} must be text": "{what}必须是文本",
    "{what} must be a number from {low} to {high}, not {value}": (
        "{what}必须是 {low} 到 {high} 之间的数，而不是 {value}"
    ),
    "{what} must be a whole number from {low} to {high}, not {value}": (
        "{what}必须是 {low} 到 {high} 之间的整数，而不是 {value}"
    ),
    "the messages must be a list": "消息必须是一个列表",
    "the messages must be user and assistant in turn, the first and the last the user's": (
        "消息必须由用户与模型交替，首尾都是用户的消息"
    ),
    "a dialogue may have {most} messages, not {count}; begin a new one": (
        "一次对话最多 {most} 条消息，现有 {count} 条；请开始新对话"
    ),
    "a dialogue may have {most} characters, not {count}; begin a new one": (
        "一次对话最多 {most} 个字符，现有 {count} 个；请开始新对话"
    ),
    "the session must be named by a short text": "会话名必须是一段短文本",
    "the message takes {count} tokens with its template, but only {free} of the model's {context} "
    "are free for it: shorten it": (
        "消息连同模板共 {count} 个词元，而模型的 {context} 个词元中只有 {free} 个可用；请缩短"
    ),
    # checkpoints and memory
    "there is no such checkpoint; choose one from the list": "没有这个检查点；请从列表中选择",
    "this run has no checkpoint of that name; choose one from the list": (
        "本次训练没有这个名称的检查点；请从列表中选择"
    ),
    "{label} is not finished; try again later": "{label} 尚未写完；请稍后再试",
    "{label} is not there any more; choose another checkpoint": (
        "{label} 已不存在；请选择其他检查点"
    ),
    "{label} is a link that leaves the run directory: it is not loaded": (
        "{label} 是指向训练目录之外的链接，不予加载"
    ),
    "{label} was written anew since this answer; ask again": (
        "{label} 在此回答之后被重新写入；请重新提问"
    ),
    "this run has no reward model": "本次训练没有奖励模型",
    "memory ran out while {label} was in use; choose a shorter answer, or wait until other answers "
    "are done": "使用 {label} 时内存不足；请选择更短的回答，或等待其他回答结束",
    "no memory became free for {label} within {seconds} s; try again later": (
        "{seconds} 秒内没有可供 {label} 使用的内存；请稍后再试"
    ),
    "{label} takes {size} GB with room to work, but only {free} GB of memory are free": (
        "{label} 运行时需要 {size} GB 内存，而空闲的只有 {free} GB"
    ),
    # answers and votes
    "{count} answers are being written already; try again in a moment": (
        "已有 {count} 个回答正在生成；请稍后再试"
    ),
    "the answer failed inside the server; its log says why": "服务器内部出错，原因见其日志",
    "the model's logits are not finite: look for an update that diverged": (
        "模型的 logits 不是有限值：请检查训练是否发散"
    ),
    "this answer is not remembered any more; ask again": "此回答已不再保留；请重新提问",
    "vote first: scores would give the two models away": "请先投票：分数会透露是哪个模型",
    "wait until the answer is finished": "请等待回答完成",
    "there is no answer to score": "没有可评分的回答",
    "blind must be true or false": "盲评只能为开或关",
    "a vote is one of {verdicts}, not {value}": "投票只能是 {verdicts} 之一，而不是 {value}",
    "this comparison is not remembered any more; compare again": "此对比已不再保留；请重新对比",
    "this comparison has its vote already; the first one counts": "此对比已投过票；以第一票为准",
    "one of the answers failed; compare again": "其中一个回答出错；请重新对比",
    "wait until both answers have begun": "请等待两个回答都开始",
    "the vote could not be written to {file}: {why}": "投票无法写入 {file}：{why}",
    "There is no SFT model here, so there is no KL.": "这里没有 SFT 模型，因此没有 KL。",
    "The SFT model has another tokenizer, so there is no KL.": (
        "SFT 模型使用另一种分词器，因此没有 KL。"
    ),
    "There is no reward model here, so there is no score.": "这里没有奖励模型，因此没有奖励分。",
    # conversations
    "{count} messages are too many to keep; begin anew": "{count} 条消息过多，无法保存；请重新开始",
    "the settings are too long to be kept": "设置过长，无法保存",
    "the conversation is too long to be kept; begin a new one": "对话过长，无法保存；请开始新对话",
    "the conversation could not be kept: {why}": "对话无法保存：{why}",
    "this browser's key is none of this server's; reload the page": (
        "此浏览器的密钥不属于本服务器；请刷新页面"
    ),
    "a history is {names}": "历史记录只能是 {names}",
    "a message to keep needs the role user or assistant": "要保存的消息必须属于用户或模型",
    "only texts and numbers can be kept in the history": "历史记录中只能保存文本和数字",
    # progress
    "held-out prompts belong to a run; open a run directory": (
        "留出提示属于训练；请打开一个训练目录"
    ),
    "measuring needs the SFT model; wait until it is there": "测量需要 SFT 模型；请等待其完成",
    "the two checkpoints share no weights to be compared": "两个检查点没有可比较的共同权重",
}
PATTERNS = [
    (re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>.+)", re.escape(english))), chinese)
    for english, chinese in SENTENCES.items()
]


def refusal(language: str, sentence: str) -> str:
    """A sentence of the server in the page's language."""
    if language != "zh":
        return sentence
    for pattern, chinese in PATTERNS:
        if found := pattern.fullmatch(sentence):
            return chinese.format(**{k: PARTS.get(v, v) for k, v in found.groupdict().items()})
    return OTHERS.format(sentence=sentence)
