"""Writes a tiny model of transformers with random weights and a tokenizer: python tiny_model.py DIRECTORY."""

import sys

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

directory = sys.argv[1]
letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # a token is a byte
tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)

torch.manual_seed(0)
config = AutoConfig.for_model(
    "olmo_hybrid",
    vocab_size=len(letters),
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    layer_types=["linear_attention", "full_attention", "linear_attention"],
    num_attention_heads=4,
    num_key_value_heads=2,
    linear_num_key_heads=2,
    linear_num_value_heads=2,
    linear_key_head_dim=12,
    linear_value_head_dim=24,
    max_position_embeddings=128,
    rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    pad_token_id=None,
    eos_token_id=None,
)
AutoModelForCausalLM.from_config(config).save_pretrained(directory)
