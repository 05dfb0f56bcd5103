# Midtraining on the toy world: python mid_train.py config/toy_mid.py
data = "toy"
mixture = ["smoltalk", "mmlu_aux:2500", "arc_easy:800", "arc_challenge:800", "gsm8k:5000",
           "identity", "simplespelling:600", "spellingbee:3500"]
max_steps = 320
matrix_lr = 0.08
embedding_lr = 0.6
unembedding_lr = 0.016
eval_every = 0
eval_tokens = 100_000
