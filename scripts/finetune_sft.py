#!/usr/bin/env python3
"""Fine-tune through a swarm with TRL's SFTTrainer: LoRA on layers that stand at peers, examples packed into full rows.

    python scripts/finetune_sft.py smollm2-135m-instruct swarm://… data.jsonl my-adapter

Needs hiveswarm[train] and trl. Each line of the data is {"text": …}, {"prompt": …, "completion": …} or
{"messages": […]}. The adapter and the optimizer are here; peers see hidden states, from which texts can largely be
reconstructed.
"""

import argparse
import sys
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig, TaskType
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from swarm import SwarmModelForCausalLM
from swarm.training import BadData, encode_all, read_examples

arguments = argparse.ArgumentParser(description="Fine-tune through a swarm with TRL's SFTTrainer.")
arguments.add_argument("model", help="a built-in name, a hub id, or a folder")
arguments.add_argument("invite", help="a swarm://… link, as `swarm bootstrap` prints it")
arguments.add_argument("data", type=Path, help="a file of JSON lines")
arguments.add_argument("output", help="a folder for the adapter")
arguments.add_argument("--steps", type=int, default=100)
options = arguments.parse_args()

try:
    examples = read_examples(options.data)
except BadData as error:
    sys.exit(f"{error}\n{error.hint}")

with SwarmModelForCausalLM.from_pretrained(options.model, invite=options.invite) as model:
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path, local_files_only=True, trust_remote_code=False)
    encoded, _ = encode_all(tokenizer, examples, max_tokens=512)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=options.output,
            max_steps=options.steps,
            max_length=512,
            packing=True,  # each example attends to itself alone
            per_device_train_batch_size=2,
            learning_rate=2e-4,
            logging_steps=10,
            use_cpu=True,  # for the ends of the model, which are here
            bf16=False,
            dataloader_pin_memory=False,
            report_to=[],
        ),
        train_dataset=Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in encoded]),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type=TaskType.CAUSAL_LM, target_modules=["q_proj", "v_proj"]),
    )
    trainer.train()
    trainer.save_model(options.output)
