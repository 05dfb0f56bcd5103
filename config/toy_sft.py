# Supervised finetuning on the toy world: python chat_sft.py config/toy_sft.py
data = "toy"
mixture = ["smoltalk:6000", "mmlu_aux:1200", "arc_easy:600", "arc_challenge:600",
           "gsm8k:1200", "identity", "simplespelling:200", "spellingbee:1500"]
max_steps = 110
matrix_lr = 0.08
embedding_lr = 0.6
unembedding_lr = 0.016
lr_fraction = 0.3
eval_every = 0
eval_tokens = 100_000
