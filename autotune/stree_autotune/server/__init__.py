"""Tuning the server that you run: plan of measurements, import of results, verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stree_kernels.lazy import exports

if TYPE_CHECKING:
    from stree_autotune.server.acceptance import exact as exact
    from stree_autotune.server.gather import Names as Names, import_files as import_files
    from stree_autotune.server.plan import Plan as Plan, plan_script as plan_script
    from stree_autotune.server.tables import (
        ServerAcceptance as ServerAcceptance,
        ServerTable as ServerTable,
        acceptance_path as acceptance_path,
        load_server_acceptance as load_server_acceptance,
        load_server_table as load_server_table,
        save as save,
        table_path as table_path,
    )
    from stree_autotune.server.tuning import (
        NAMES as NAMES,
        ServerRequest as ServerRequest,
        rates_by_size as rates_by_size,
        tune_server as tune_server,
    )

__getattr__, __dir__ = exports(
    __name__,
    {
        "acceptance": ["exact"],
        "gather": ["Names", "import_files"],
        "plan": ["Plan", "plan_script"],
        "tables": [
            "ServerAcceptance",
            "ServerTable",
            "acceptance_path",
            "load_server_acceptance",
            "load_server_table",
            "save",
            "table_path",
        ],
        "tuning": ["NAMES", "ServerRequest", "rates_by_size", "tune_server"],
    },
)
