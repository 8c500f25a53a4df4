"""Arguments of transformers and Lightning that have another form here: their names to what to write."""

from collections.abc import Iterable, Mapping

from ...precision.names import near_names

PRECISION = "Write precision='bf16-mixed', '16-mixed', 'bf16-true', ...: how numbers are kept is one word of Fit's."
EVALUATES_SO = "evaluation runs in the run's own precision. Write precision='bf16-true' to have weights in 16 bits"
STRATEGY = "Where the model runs is one word of Fit's: strategy='single', 'ddp', 'fsdp2', 'tp', 'deepspeed', ..."
DDP = "It is an option of the strategy: strategy=DDP(...), from stratagem.strategies."
UPLOADS = "Checkpoints are uploaded by a callback: stratagem.Upload(url)."
LOGGERS = "Where logs go is Fit's loggers=['jsonl', 'wandb'], by word or as instances (docs/loggers.md)."
CALLED = "What is done is what you call: fit.train(), fit.evaluate(), fit.predict(data)."
COLUMNS = "A batch goes to forward by the names of its parameters, and what forward doesn't take stays out of it"
PADDING = "Tokenizing is the data's. What pads is Fit(data_collator=DataCollatorWithPadding(tokenizer))."
LOADER = "Give Fit a DataLoader as train_data, with the collate_fn and whatever else you like."
OPTIMIZER = "Override TrainModule.configure_optimizer(args) and configure_scheduler(optimizer, args), or write optim=."
BATCH = "Write per_device_train_batch_size and per_device_eval_batch_size."
COMPILES = "Write torch_compile=True, with torch_compile_backend and torch_compile_mode."
DISPLAY = "Write progress=False for no display; warnings go through Python's warnings."

TRANSFORMERS: Mapping[str, str] = {
    # Fields of TrainingArguments in transformers 5.
    "bf16": PRECISION,
    "fp16": PRECISION,
    "bf16_full_eval": f"Here {EVALUATES_SO}.",
    "fp16_full_eval": f"Here {EVALUATES_SO}.",
    "average_tokens_across_devices": "The mean over all ranks' tokens is the only loss there is here: leave it out.",
    "restore_callback_states_from_checkpoint": "A resume always restores the callbacks that have a state: leave it "
    "out.",
    "activation_checkpointing": "Write gradient_checkpointing=True.",
    "activation_checkpointing_kwargs": "Write gradient_checkpointing_kwargs.",
    "use_liger_kernel": "Patch the model before TrainModule.wrap(model): liger_kernel.transformers has a function for "
    "each family.",
    "liger_kernel_config": "Patch the model before TrainModule.wrap(model), with the options of its function.",
    "use_cache": "Set model.config.use_cache before TrainModule.wrap(model).",
    "log_on_each_node": "Logs are of the whole run and go to the main process's loggers: leave it out.",
    "log_level": DISPLAY,
    "log_level_replica": DISPLAY,
    "disable_tqdm": "Write progress=False.",
    "report_to": LOGGERS,
    "project": LOGGERS,
    "trackio_space_id": LOGGERS,
    "trackio_bucket_id": LOGGERS,
    "trackio_static_space_id": LOGGERS,
    "prediction_loss_only": "Predictions are kept where compute_metrics is given, and by fit.predict: leave it out.",
    "eval_do_concat_batches": "Predictions are always joined: leave it out, or take them in on_prediction_step.",
    "eval_use_gather_object": "Predictions of any kind are gathered: leave it out.",
    "include_for_metrics": "Return what your metric needs from TrainModule.metric_inputs(outputs, batch), and the "
    "metric from TrainModule.metrics().",
    "batch_eval_metrics": "Metrics that are summed up batch by batch are torchmetrics from TrainModule.metrics().",
    "save_only_model": "A checkpoint is one to resume from. For weights alone call fit.export(path), and "
    "save_strategy='no'.",
    "save_on_each_node": "Checkpoints are written once, by all ranks together: output_dir must be shared by the nodes.",
    "enable_jit_checkpoint": "Have a callback set control.should_save and control.should_training_stop.",
    "push_to_hub": UPLOADS,
    "hub_token": UPLOADS,
    "hub_private_repo": UPLOADS,
    "hub_model_id": UPLOADS,
    "hub_strategy": UPLOADS,
    "hub_always_push": UPLOADS,
    "hub_revision": UPLOADS,
    "use_cpu": "A machine without accelerator trains on its CPU. To hide a GPU, run with CUDA_VISIBLE_DEVICES=''.",
    "accelerator_config": "There is no accelerate underneath. Ranks share each batch of a Dataset, by strategy=.",
    "parallelism_config": "Write strategy=FSDP2(tensor_parallel=..., context_parallel=...), from stratagem.strategies.",
    "dataloader_multiprocessing_context": LOADER,
    "dataloader_in_order": LOADER,
    "remove_unused_columns": f"{COLUMNS}: leave it out.",
    "label_names": "The loss reads its labels from the batch: TrainModule.loss(outputs, batch), or 'labels'.",
    "ddp_find_unused_parameters": DDP,
    "ddp_bucket_cap_mb": DDP,
    "ddp_broadcast_buffers": DDP,
    "ddp_static_graph": DDP,
    "ddp_backend": f"The backend follows from the device. {DDP}",
    "ddp_timeout": "Have torchrun's environment set it: TORCH_DISTRIBUTED's timeouts, or init_process_group(timeout=) "
    "before Fit.",
    "fsdp": "Write strategy='fsdp2'.",
    "fsdp_config": "Write strategy=FSDP2(...), from stratagem.strategies.",
    "deepspeed": "Write strategy='deepspeed', or DeepSpeed(config=...) from stratagem.strategies.",
    "skip_memory_metrics": "The peak of device memory is measured without a cost and is in the last log: leave it out.",
    "do_train": CALLED,
    "do_eval": CALLED,
    "do_predict": CALLED,
    "resume_from_checkpoint": "Write fit.train(resume_from_checkpoint=...).",
    "local_rank": "torchrun sets it, or Fit(devices=...) does: leave it out.",
    # Fields of TrainingArguments in earlier versions.
    "overwrite_output_dir": "Checkpoints are never overwritten; train(resume_from_checkpoint=True) goes on from them.",
    "evaluation_strategy": "Write eval_strategy.",
    "group_by_length": "Write train_sampling_strategy='group_by_length'.",
    "no_cuda": "A machine without accelerator trains on its CPU. To hide a GPU, run with CUDA_VISIBLE_DEVICES=''.",
    "use_mps_device": "An accelerator that is there is used: leave it out.",
    "use_ipex": COMPILES,
    "jit_mode_eval": COMPILES,
    "torchdynamo": COMPILES,
    "half_precision_backend": PRECISION,
    "fp16_backend": PRECISION,
    "fp16_opt_level": "Write precision='apex-O1' or 'apex-O2'.",
    "sharded_ddp": "Write strategy='fsdp2'.",
    "fsdp_min_num_params": "Write shard_units(self) on your TrainModule.",
    "fsdp_transformer_layer_cls_to_wrap": "Write shard_units(self) on your TrainModule.",
    "tpu_num_cores": "Write strategy='xla'.",
    "per_gpu_train_batch_size": "Write per_device_train_batch_size.",
    "per_gpu_eval_batch_size": "Write per_device_eval_batch_size.",
    "adafactor": "Write optim='adafactor'.",
    "dispatch_batches": "Ranks share each batch of a Dataset; of a stream each reads its own part: leave it out.",
    "split_batches": "Batch sizes are per device: write per_device_train_batch_size.",
    "include_inputs_for_metrics": "Return what your metric needs from TrainModule.metric_inputs(outputs, batch).",
    "logging_dir": "Write loggers=[stratagem.TensorBoardLogger(directory)].",
    "push_to_hub_model_id": UPLOADS,
    "push_to_hub_organization": UPLOADS,
    "push_to_hub_token": UPLOADS,
    "ray_scope": "fit.hyperparameter_search uses Optuna; see docs/search.md.",
    "mp_parameters": STRATEGY,
    "save_safetensors": "Checkpoints are safetensors and JSON: leave it out.",
    "warmup_step": "Write warmup_steps.",
    # Arguments of transformers' Trainer, and of Lightning's.
    "model": "The first argument is the module: Fit(TrainModule.wrap(model), ...).",
    "train_dataset": "Write train_data=.",
    "eval_dataset": "Write eval_data=.",
    "data_collator": "It is one of Fit's own: Fit(data_collator=...).",
    "collate_fn": "Write Fit(data_collator=...).",
    "tokenizer": PADDING,
    "processing_class": PADDING,
    "model_init": "Write module_init=: a function of a trial that returns a TrainModule.",
    "optimizers": OPTIMIZER,
    "optimizer_cls_and_kwargs": "Write optim=TheClass, optim_args={...}.",
    "compute_loss": "Write compute_loss_func=, or override TrainModule.loss.",
    "peft_config": "Give the model its adapters first: TrainModule.wrap(get_peft_model(model, config)).",
}
LIGHTNING: Mapping[str, str] = {
    "accelerator": "The accelerator that is there is used, else the CPU: leave it out.",
    "num_nodes": "torchrun starts the ranks of several nodes: leave it out.",
    "logger": LOGGERS,
    "max_epochs": "Write num_train_epochs, which may be a fraction.",
    "min_epochs": "There is no minimum: write num_train_epochs, and EarlyStopping's patience.",
    "min_steps": "There is no minimum: write max_steps, and EarlyStopping's patience.",
    "limit_val_batches": "Write limit_eval_batches.",
    "limit_test_batches": "Write limit_eval_batches; fit.evaluate(data) follows it, too.",
    "limit_predict_batches": "Give fit.predict a part of the data (torch.utils.data.Subset).",
    "val_check_interval": "Write eval_strategy='steps' and eval_steps, a number of updates or a fraction of the run.",
    "check_val_every_n_epoch": "Write eval_strategy='epoch'.",
    "num_sanity_val_steps": "Write eval_on_start=True.",
    "log_every_n_steps": "Write logging_steps.",
    "enable_checkpointing": "Write save_strategy='no' for none.",
    "enable_progress_bar": "Write progress=False for none.",
    "enable_model_summary": "print(module) shows the layers: leave it out.",
    "accumulate_grad_batches": "Write gradient_accumulation_steps.",
    "gradient_clip_val": "Write max_grad_norm.",
    "gradient_clip_algorithm": "The 2-norm of all gradients is clipped, to max_grad_norm.",
    "benchmark": "Set torch.backends.cudnn.benchmark before Fit.",
    "inference_mode": "Evaluation runs without gradients: leave it out.",
    "use_distributed_sampler": "Ranks share each batch of a Dataset, by strategy=: leave it out.",
    "detect_anomaly": "Write debug='underflow_overflow', or torch.autograd.set_detect_anomaly(True) before Fit.",
    "sync_batchnorm": "Convert the model with torch.nn.SyncBatchNorm.convert_sync_batchnorm before Fit.",
    "default_root_dir": "Write output_dir.",
    "ckpt_path": "Write fit.train(resume_from_checkpoint=...).",
    "datamodule": "Write train_data= and eval_data=.",
    "train_dataloaders": "Write train_data=, which takes a DataLoader, too.",
    "val_dataloaders": "Write eval_data=, which takes a DataLoader, too.",
}
GENERAL: Mapping[str, str] = {
    "lr": "Write learning_rate.",
    "num_epochs": "Write num_train_epochs, which may be a fraction.",
    "epochs": "Write num_train_epochs, which may be a fraction.",
    "max_duration": "Write num_train_epochs, which may be a fraction, or max_steps.",
    "steps_per_epoch": "Write max_steps, the updates of the whole run.",
    "validation_data": "Write eval_data=.",
    "train_dataloader": "Write train_data=, which takes a DataLoader, too.",
    "eval_dataloader": "Write eval_data=, which takes a DataLoader, too.",
    "eval_interval": "Write eval_strategy='steps' and eval_steps, a number of updates or a fraction of the run.",
    "save_folder": "Write output_dir.",
    "save_interval": "Write save_steps, a number of updates or a fraction of the run.",
    "device_train_microbatch_size": "Write per_device_train_batch_size, or auto_find_batch_size=True.",
    "verbose": DISPLAY,
    "batch_size": BATCH,
    "optimizer": OPTIMIZER,
    "scheduler": OPTIMIZER,
    "lr_scheduler": "Write lr_scheduler_type, or override TrainModule.configure_scheduler.",
    "device": "The accelerator that is there is used, else the CPU: leave it out.",
    "num_workers": "Write dataloader_num_workers.",
    "distributed": STRATEGY,
    "save_top_k": "Write save_best_limit, beside save_total_limit.",
    "every_n_train_steps": "Write save_steps.",
}
DIFFERENT: Mapping[str, str] = {
    "optim": '"adamw" is fused where the device can; what transformers has beside ours is refused by name',
    "optim_args": "a dict, or transformers' text; numbers are numbers in it",
    "lr_scheduler_type": "a polynomial ends at 0 unless lr_end is given (there 1e-7), cosine_with_min_lr at a tenth of "
    "the peak (there without a default)",
    "max_grad_norm": "0 leaves the norm out of the log, too",
    "torch_compile_backend": "refused without torch_compile=True, which it doesn't switch on",
    "torch_compile_mode": "refused without torch_compile=True, which it doesn't switch on",
    "include_num_input_tokens_seen": '"all" for True, "no" for False',
    "logging_nan_inf_filter": "losses that aren't finite are left out of the mean, and counted",
    "eval_accumulation_steps": "None moves each batch to the host, as 1 does (there it keeps all on the device)",
    "load_best_model_at_end": "save_total_limit spares the best checkpoint",
    "save_total_limit": "None keeps all; at least 1",
    "full_determinism": "from the beginning of training to its end, and given back after it",
    "tf32": "in training, and given back after it; True is refused where there is none",
    "dataloader_drop_last": "in training alone: an evaluation sees every sample",
    "dataloader_prefetch_factor": "refused without workers",
    "dataloader_persistent_workers": "refused without workers",
    "train_sampling_strategy": 'without "batch_rebalance"; groups are refused where the data has an order of its own',
    "debug": '"" or "underflow_overflow"',
    "metric_for_best_model": '"loss" also where checkpoints aren\'t loaded',
}
"""Arguments that have the same name in transformers, and aren't quite the same here."""

FOREIGN: Mapping[str, str] = {**GENERAL, **LIGHTNING, **TRANSFORMERS}


def unknown_argument(name: str, known: Iterable[str], owner: str = "Fit") -> str:
    """Return the error text for an argument that doesn't exist: what to write instead, or the nearest names.

    Args:
        name: what was written.
        known: what there is.
        owner: what has no such argument.
    """
    return f"{owner} has no argument {name!r}. {FOREIGN.get(name) or near_names(name, known)}"
