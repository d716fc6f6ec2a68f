"""Prune a BLIP of transformers: vision, question encoder and answer decoder to one budget.

Runs offline in seconds on a tiny BLIP with random weights, on random questions.
"""

import torch
from transformers import BlipConfig, BlipForQuestionAnswering

import vlprune
from vlprune.tasks import CallableTask

torch.manual_seed(0)
layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
text = {"vocab_size": 60, "intermediate_size": 64, "encoder_hidden_size": 32, "pad_token_id": 0}
special = {"bos_token_id": 57, "sep_token_id": 58, "eos_token_id": 2}
vision = {"image_size": 32, "patch_size": 8, "intermediate_size": 64}
config = BlipConfig(text_config={**layers, **text, **special}, vision_config={**layers, **vision})
# For real weights: model = BlipForQuestionAnswering.from_pretrained("Salesforce/blip-vqa-base")
model = BlipForQuestionAnswering(config).eval()

batches = [  # and batches of your BlipProcessor; `vlprune.tasks.QuestionAnswering` also measures
    {
        "pixel_values": torch.randn(8, 3, 32, 32),
        "input_ids": torch.randint(3, 57, (8, 7)),
        "attention_mask": torch.ones(8, 7, dtype=torch.long),
        "labels": torch.randint(3, 57, (8, 4)),
    }
    for _ in range(2)
]
task = CallableTask(batches, loss=lambda model, batch: model(**batch).loss.mean())

scores = vlprune.score(model, "fisher", task)
plan = vlprune.plan(scores, {"prunable_params": 0.5}, min_units=1)
small = vlprune.prune(model, plan)  # masked = cut is proven before it returns

towers = {axis.tower for axis in plan.axes}
print(f"one budget over {', '.join(sorted(towers))}")
print(plan)
answers = small.generate(**{k: v for k, v in batches[0].items() if k != "labels"}, max_new_tokens=5)
print(f"answers: {tuple(answers.shape)} token ids")
