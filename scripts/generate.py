#!/usr/bin/env python3
"""Generate text through a swarm with the Python API.

    python scripts/generate.py smollm2-135m-instruct swarm://… "What is the capital of France?"

The object is a Hugging Face model: all of `generate` works. Peers can read what you send.
"""

import argparse

from transformers import AutoTokenizer, TextStreamer

from swarm import SwarmModelForCausalLM

arguments = argparse.ArgumentParser(description="Generate text through a swarm.")
arguments.add_argument("model", help="a built-in name, a hub id, or a folder")
arguments.add_argument("invite", help="a swarm://… link, as `swarm bootstrap` prints it")
arguments.add_argument("prompt")
arguments.add_argument("--max-new-tokens", type=int, default=128)
options = arguments.parse_args()

# Embeddings, norm and head are here; the layers in between are wherever their peers are.
with SwarmModelForCausalLM.from_pretrained(options.model, invite=options.invite) as model:
    # from the files that came with the model; none of them is run as code
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path, local_files_only=True, trust_remote_code=False)
    chat = [{"role": "user", "content": options.prompt}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model.generate(
        **inputs,
        max_new_tokens=options.max_new_tokens,
        do_sample=False,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )
    for hop in model.route.hops:
        print(f"blocks {hop.span} were computed by {hop.peer_id}")
