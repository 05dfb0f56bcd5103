# toy-CORE and bits per byte: python base_eval.py config/toy_base_eval.py
data = "toy"
eval_tokens = 200_000
