# Supervised finetuning on the toy world: python chat_sft.py config/toy_sft.py
data = "toy"
mixture = ["smoltalk:7000", "mmlu_aux:1000", "arc_easy:500", "arc_challenge:500",
           "gsm8k:800", "identity", "simplespelling:200", "spellingbee:1000"]
max_steps = 130
matrix_lr = 0.08
embedding_lr = 0.6
unembedding_lr = 0.016
lr_fraction = 0.3
eval_every = 0
eval_tokens = 100_000
