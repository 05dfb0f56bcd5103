"""
Training on conversations, the loop of both midtraining (mid_train.py) and supervised finetuning (chat_sft.py). They differ in
their settings, in the model that they go on from, and in what counts: every token, or only what the assistant says.
"""
import time
from types import SimpleNamespace

import checkpoint
import common
import data as dataset
import phase
import tasks
import tokenizer as tok

def run(stage, parent, settings, every_token):
    """Trains `stage` ("mid" or "sft") on from the model of the stage `parent` and ends the process.
    in: settings as mid_train.py and chat_sft.py declare them; every_token: whether the user's tokens are trained on too"""
    s = SimpleNamespace(**settings)

    # inputs, all checked before a model is made

    mixture = s.mixture + ([s.extra_conversations] if s.extra_conversations else [])
    common.check(mixture and s.held_out, "--mixture and --held_out must not be empty: there is nothing to learn from, or nothing to measure on")
    parent_dir, parent_step = checkpoint.find_model(parent, s.data, s.tag)
    directory = common.stage_dir(stage, s.data, parent_dir.name)
    metrics = directory / "metrics.jsonl"
    tokenizer = tok.load_tokenizer(common.tokenizer_dir(s.data))
    checkpoint.must_fit(parent_dir, parent_step, tokenizer)
    files, val_files = tasks.fingerprint(mixture, "train", s.data), tasks.fingerprint(s.held_out, "test", s.data)

    common.init_distributed()
    resumed = common.on_rank0(phase.begin, directory, {"mid": "mid_train", "sft": "chat_sft"}[stage], settings,
                              {"tokenizer": tokenizer.fingerprint, "tasks": files, parent: checkpoint.fingerprint(parent_dir, parent_step)},
                              lambda: None if checkpoint.newest(directory) is not None else "no whole checkpoint", s.start_over)

    # model, optimizer, rows

    import torch
    import optim
    import training

    compute = common.init_compute(settings, resumed.get("chosen"))
    phase.note(directory, chosen=common.chosen(compute))
    found = common.on_rank0(checkpoint.newest, directory)
    model_state, optim_state, meta = checkpoint.load(directory, found) if found is not None else checkpoint.load(parent_dir, parent_step, optimizer=False)
    model = checkpoint.build_model(meta, model_state, compute.device, compute.dtype)
    row_length = model.config.sequence_len + 1
    stores = dataset.tokenize_conversations(files + f"-{s.seed}", s.data, lambda: tasks.mixture(mixture, s.data, s.seed), tokenizer, row_length)
    val_stores = dataset.tokenize_conversations(val_files + "-val", s.data, lambda: tasks.mixture(s.held_out, s.data, 1, "test"), tokenizer, row_length)
    if every_token:
        stores, val_stores = ([store._replace(mask=None) for store in part] for part in (stores, val_stores))
    plan = dataset.make_plan(stores, row_length, tokenizer.bos, split=False)
    val_plan = dataset.make_plan(val_stores, row_length, tokenizer.bos, split=False)

    batch_tokens = s.total_batch_size if s.total_batch_size != -1 else meta["batch_tokens"]
    rows = max(1, batch_tokens // model.config.sequence_len)
    batch_tokens = rows * model.config.sequence_len
    num_steps = max(1, dataset.n_rows(plan) // rows)
    num_steps = min(num_steps, s.max_steps) if s.max_steps != -1 else num_steps
    s.device_batch_size = training.rows_that_fit(stage, "device_batch_size", s.device_batch_size, s.data, directory.name, compute)
    micro_rows = dataset.fit_micro_rows(rows, s.device_batch_size, compute.world)
    scale = s.lr_fraction * min(1.0, (batch_tokens / 2 ** 19) ** 0.5)
    optimizer = optim.make_optimizer(model, matrix_lr=s.matrix_lr * scale, embedding_lr=s.embedding_lr * scale, unembedding_lr=s.unembedding_lr * scale,
                                     scalar_lr=s.scalar_lr * scale, weight_decay=0.0, compute_dtype=compute.dtype)
    common.print0(f"{stage} {directory.name}: {stores[0].facts['documents']:,} conversations ({stores[0].facts['cut']} longer than a row and cut) "
                  f"in {dataset.n_rows(plan):,} rows, {num_steps:,} steps of {batch_tokens:,} tokens; "
                  f"{compute.world} x {compute.device.type}, {compute.dtype}, compile={compute.compile}")

    # where it was

    step, spent, skipped, loss, val_bpb = 0, 0.0, 0, None, None
    if found is not None:
        optimizer.load_state_dict(optim_state)
        step, spent, skipped, loss, val_bpb = meta["step"], meta["seconds"], meta["skipped"], meta["loss"], meta["val_bpb"]
        common.print0(f"continuing at step {step:,} of {num_steps:,}")
    common.trim_metrics(metrics, step)
    common.set_deadline(s.time_limit)
    forward = torch.compile(model, dynamic=False) if compute.compile else model
    training.start_clock(num_steps, step, spent, s.save_minutes)
    training.explain_out_of_memory(stage, device_batch_size=s.device_batch_size)

    def save(wait=True):
        t0 = time.monotonic()
        state = optimizer.state_dict()  # a collective call: gathers the shards
        if compute.rank == 0:
            checkpoint.save(directory, step, model.state_dict(), state, {
                "model": meta["model"], "tokenizer": tokenizer.fingerprint, "settings": settings, "num_steps": num_steps,
                "batch_tokens": batch_tokens, "tokens": step * batch_tokens, "seconds": training.spent(),
                "skipped": skipped, "loss": loss, "val_bpb": val_bpb}, s.keep, wait)
        training.saved(t0)

    # the loop: save when due, measure when due, then train one step

    while True:
        last = step == num_steps
        measuring = last or (s.eval_every and step % s.eval_every == 0)
        training.save_or_stop(save, directory, step, num_steps, measuring)

        if measuring:
            val_bpb = training.bits_per_byte(model, val_plan, tokenizer, s.eval_tokens, micro_rows, compute)
            if val_bpb is None:
                phase.interrupted(directory, f"stopped while measuring; saved at step {checkpoint.last_step(directory)} of {num_steps}")
            common.append_metrics(metrics, {"kind": "val", "step": step, "val_bpb": val_bpb})
            common.print0(f"step {step:,}: held-out conversations {val_bpb:.4f} bits per byte")
        if last:
            break

        lr_scale = training.lr_scale(step, num_steps, 0.0, s.warmdown_ratio, 0.0)
        optimizer.set(lr_scale=lr_scale, muon_momentum=0.95, muon_weight_decay=0.0)
        counted = dataset.counted_targets(plan, s.seed, step, rows)
        total = torch.zeros((), device=compute.device)
        for x, y in dataset.batch(plan, s.seed, step, rows, micro_rows, compute.rank, compute.world):
            # a row of which nothing is trained on adds 0: the sum is divided by what the whole batch counts
            micro_loss = forward(training.to_device(x, compute), training.to_device(y, compute), reduction="sum") / max(counted, 1)
            micro_loss.backward()
            total += micro_loss.detach()
        norm = optimizer.step()
        optimizer.zero_grad()
        loss = training.all_sum(total)
        step += 1

        skipped = training.count_skipped(skipped, loss, norm, s.max_skipped, directory)
        training.watch(loss, directory)
        reading = training.tick(step, f"loss {loss:.4f} | lr {lr_scale:.2f}", batch_tokens, model.flops_per_token(), compute)
        common.append_metrics(metrics, {"kind": "train", "step": step - 1, "loss": loss, "norm": norm, "lr_scale": lr_scale, "clock": reading})

    phase.done(directory, step=step, seconds=training.spent(), val_bpb=val_bpb)
    common.print0(f"{stage} {directory.name}: {val_bpb:.4f} bits per byte after {step:,} steps in {common.clock(training.spent())}; saving took {100 * training.save_share():.2f} % of it")
    common.leave()
