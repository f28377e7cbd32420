#!/usr/bin/env python3
"""Fine-tune through a swarm with TRL's DPOTrainer: which of two answers is better is learned, with LoRA.

    python scripts/finetune_dpo.py smollm2-135m-instruct swarm://… pairs.jsonl my-adapter

Needs hiveswarm[train] and trl. Each line of the data is {"prompt": …, "chosen": …, "rejected": …}, of texts or of
messages. The reference is the same model with the adapter switched off, so no second one is needed. The adapter and the
optimizer are here; peers see hidden states, from which texts can largely be reconstructed.
"""

import argparse
import sys
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig, TaskType
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

from swarm import SwarmModelForCausalLM
from swarm.training import BadData, read_preferences

arguments = argparse.ArgumentParser(description="Fine-tune through a swarm with TRL's DPOTrainer.")
arguments.add_argument("model", help="a built-in name, a hub id, or a folder")
arguments.add_argument("invite", help="a swarm://… link, as `swarm bootstrap` prints it")
arguments.add_argument("data", type=Path, help="a file of JSON lines")
arguments.add_argument("output", help="a folder for the adapter")
arguments.add_argument("--steps", type=int, default=100)
options = arguments.parse_args()

try:
    pairs = read_preferences(options.data)
except BadData as error:
    sys.exit(f"{error}\n{error.hint}")

with SwarmModelForCausalLM.from_pretrained(options.model, invite=options.invite) as model:
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path, local_files_only=True, trust_remote_code=False)
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=options.output,
            max_steps=options.steps,
            max_length=512,
            beta=0.1,
            per_device_train_batch_size=2,
            learning_rate=5e-5,
            logging_steps=10,
            use_cpu=True,  # for the ends of the model, which are here
            bf16=False,
            dataloader_pin_memory=False,
            report_to=[],
        ),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type=TaskType.CAUSAL_LM, target_modules=["q_proj", "v_proj"]),
    )
    trainer.train()
    trainer.save_model(options.output)
