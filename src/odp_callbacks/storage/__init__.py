"""Records on disk: a folder of two Parquet tables that pandas, polars and DuckDB can read, without pickle.

``nodes.parquet`` has one row for each node and ``rollouts.parquet`` one for each rollout. What belongs to the probe as
a whole is JSON in the metadata of the first, under the key ``odp_callbacks``, together with the version of the format.
The columns are the attributes of :class:`~odp_callbacks.records.NodeRecord` and
:class:`~odp_callbacks.records.RolloutRecord`:

- vectors are lists;
- ``gram`` is the upper triangle of the Gram matrix on all LoRA parameters, row by row, and ``logit_gram`` that on the
  logits (float64);
- ``module_gram`` holds the upper triangles of all modules, one after another (float32, because they are the
  bulk of the file);
- ``teacher_probability`` is ``(K, A)``, row by row;
- each predictor is a column ``predictor_<name>``.

``teacher_responses.parquet`` has one row for each :class:`~odp_callbacks.records.TeacherResponse`, where there are any.
If the probe was measured in another geometry as well, the folder ``preconditioned`` holds the same two tables for it.

``manifest.json`` has the SHA-256 of each file. :func:`load` refuses a folder of which a file is missing or is not what
was written; version 1 had no manifest.

Version 2 is written. Version 1 is read as well: it had no ``token_text`` at first, which is then empty, and the names
``seconds`` and ``in_metric`` in place of ``stage_seconds`` and ``preconditioned``.
"""

from odp_callbacks.storage.folders import record_folders
from odp_callbacks.storage.manifest import DamagedRecordsError
from odp_callbacks.storage.merging import concatenate, merge, pool
from odp_callbacks.storage.reading import load
from odp_callbacks.storage.schema import RUN_SETTING
from odp_callbacks.storage.writing import save

__all__ = [
    "RUN_SETTING",
    "DamagedRecordsError",
    "concatenate",
    "load",
    "merge",
    "pool",
    "record_folders",
    "save",
]
