from mlp_jax.compare import compare as compare
from mlp_jax.data.dataset import load_dataset as load_dataset
from mlp_jax.errors import UserError as UserError
from mlp_jax.experiment import load_data as load_data
from mlp_jax.records.checkpoint import load_run as load_run
from mlp_jax.records.checkpoint import predict as predict
from mlp_jax.records.provenance import describe_environment as describe_environment
from mlp_jax.records.rows import read_runs as read_runs
from mlp_jax.report import report as report
from mlp_jax.sweep import sweep as sweep
from mlp_jax.training.config import RECIPES as RECIPES
from mlp_jax.training.config import Config as Config
from mlp_jax.training.fit import fit as fit
from mlp_jax.training.parallel import use_cores as use_cores

_ENVIRON: dict[str, str]
