"""
Phase 3: midtraining. The base model learns the form of conversations, multiple choice and the calculator from a mixture of
tasks; as in pretraining every token counts, the user's too.

    python mid_train.py --data=toy
    torchrun --standalone --nproc_per_node=8 mid_train.py

Needs the base model (base_train.py) and the task files (prepare_data.py). Kill it at any moment and run it again.
"""
import common
common.install_stop_handlers()  # before torch is imported

import configurator
import finetune

data = "fineweb_edu"         # the data set the base model was trained on
tag = ""                     # the base model to go on from; empty: the newest
mixture = ["smoltalk", "mmlu_aux", "gsm8k", "identity*2", "simplespelling:200000", "spellingbee:80000"]  # what it learns from: "name", "name*epochs", "name:examples"
extra_conversations = ""     # a .jsonl file of your own conversations, added to the mixture
max_steps = -1               # stop after so many steps; -1: one pass through the mixture
total_batch_size = -1        # tokens a step; -1: the base model's
matrix_lr = 0.02             # Muon
embedding_lr = 0.2           # AdamW: token and value embeddings
unembedding_lr = 0.004       # AdamW: lm_head
scalar_lr = 0.05             # AdamW: per-layer scalars and gates
lr_fraction = 1.0            # all learning rates are multiplied by it
warmdown_ratio = 0.8         # share of the steps with falling learning rate
seed = 1337                  # decides the order
# ---- settings below may change at every resume
device_batch_size = 32       # rows a device holds at once
eval_every = 150             # steps between measurements on held-out conversations; 0: only at the end
held_out = ["smoltalk:1000"]  # conversations it is measured on, of the test splits
eval_tokens = 1_048_576      # tokens of them
save_minutes = 3.0           # minutes between saves
keep = 1                     # checkpoints kept
time_limit = None            # minutes until it saves and stops; None: no limit (under Slurm the job's)
max_skipped = 10             # steps in a row skipped for a gradient that is not finite before it gives up
device = "auto"              # auto, cuda, mps, cpu
dtype = "auto"               # auto (measured), bfloat16, float32
threads = 0                  # CPU threads a rank; 0: the cores divided by the ranks
compile = "auto"             # torch.compile: auto, True, False
start_over = False           # put the old run of this tag aside and start from nothing
settings = configurator.configure(globals())

finetune.run("mid", "base", settings, every_token=True)
