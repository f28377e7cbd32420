#!/usr/bin/env python3
"""Fine-tune through a swarm with transformers' Trainer: LoRA on layers that stand at peers.

    python scripts/finetune_trainer.py smollm2-135m-instruct swarm://… data.jsonl my-adapter

Needs hiveswarm[train]. Each line of the data is {"text": …}, {"prompt": …, "completion": …} or {"messages": […]}. The
adapter and the optimizer are here; peers see hidden states, from which texts can largely be reconstructed.
"""

import argparse
import sys
from pathlib import Path

from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from swarm import SwarmModelForCausalLM
from swarm.training import BadData, encode_all, read_examples

arguments = argparse.ArgumentParser(description="Fine-tune through a swarm with transformers' Trainer.")
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
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, target_modules=["q_proj", "v_proj"])
    trainer = Trainer(
        model=get_peft_model(model, config),
        args=TrainingArguments(
            output_dir=options.output,
            max_steps=options.steps,
            learning_rate=2e-4,
            logging_steps=10,
            use_cpu=True,  # for the ends of the model, which are here
            dataloader_pin_memory=False,
            report_to=[],
        ),
        train_dataset=[{"input_ids": row.input_ids, "labels": row.labels} for row in encoded],
        data_collator=DataCollatorForSeq2Seq(tokenizer),  # which pads labels, too
    )
    trainer.train()
    trainer.save_model(options.output)
