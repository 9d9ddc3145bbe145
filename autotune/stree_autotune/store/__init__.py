"""Files that tuning reads and writes, and where they are found."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stree_kernels.lazy import exports

if TYPE_CHECKING:
    from stree_autotune.store.advice import (
        PairWords as PairWords,
        command as command,
        probe_command as probe_command,
        repeated as repeated,
        trace_command as trace_command,
    )
    from stree_autotune.store.gpu_spec import GpuSpec as GpuSpec
    from stree_autotune.store.library import (
        DEFAULT_DATA as DEFAULT_DATA,
        GREEDY as GREEDY,
        SEPARATOR as SEPARATOR,
        Library as Library,
        RuntimeSource as RuntimeSource,
        check_name as check_name,
        data_folder as data_folder,
        is_path as is_path,
        profile_model_name as profile_model_name,
        require_same_model as require_same_model,
        require_same_shape as require_same_shape,
        shipped_root as shipped_root,
        trace_file_name as trace_file_name,
    )
    from stree_autotune.store.open_models import (
        PairRequest as PairRequest,
        chat_warning as chat_warning,
        encode_prompts as encode_prompts,
        open_pair as open_pair,
        open_profile_pair as open_profile_pair,
        open_prompts as open_prompts,
        open_source as open_source,
        open_sources as open_sources,
        require_new as require_new,
    )
    from stree_autotune.store.origin import (
        SERVERS as SERVERS,
        command_line as command_line,
        git_sha as git_sha,
        provenance as provenance,
        utc_now as utc_now,
        version_of as version_of,
        versions as versions,
    )
    from stree_autotune.store.progress import (
        ProgressBar as ProgressBar,
        Working as Working,
        time_left as time_left,
    )
    from stree_autotune.store.prompts import PromptSet as PromptSet, parse_rows as parse_rows
    from stree_autotune.store.runtime_table import (
        SEVERAL as SEVERAL,
        STORES as STORES,
        TIMED_PATH as TIMED_PATH,
        ModelCost as ModelCost,
        NoRoom as NoRoom,
        Point as Point,
        PromptPoint as PromptPoint,
        Reader as Reader,
        RulePoint as RulePoint,
        RuntimeTable as RuntimeTable,
        Step as Step,
        StepNoRoom as StepNoRoom,
        TableMeasured as TableMeasured,
        Term as Term,
        Work as Work,
        load_runtime_table as load_runtime_table,
        runtime_file_name as runtime_file_name,
        save_runtime_table as save_runtime_table,
    )
    from stree_autotune.store.show import (
        USEFUL_GAP as USEFUL_GAP,
        answer as answer,
        print_profile as print_profile,
        print_profile_json as print_profile_json,
        title as title,
    )
    from stree_autotune.store.step_rule import StepRule as StepRule
    from stree_autotune.store.terminal import (
        digits as digits,
        make_table as make_table,
        percent as percent,
        print_json as print_json,
        report as report,
        result_console as result_console,
        say as say,
        say_note as say_note,
        show_table as show_table,
    )

__getattr__, __dir__ = exports(
    __name__,
    {
        "advice": ["PairWords", "command", "probe_command", "repeated", "trace_command"],
        "gpu_spec": ["GpuSpec"],
        "library": [
            "DEFAULT_DATA",
            "GREEDY",
            "Library",
            "RuntimeSource",
            "SEPARATOR",
            "check_name",
            "data_folder",
            "is_path",
            "profile_model_name",
            "require_same_model",
            "require_same_shape",
            "shipped_root",
            "trace_file_name",
        ],
        "open_models": [
            "PairRequest",
            "chat_warning",
            "encode_prompts",
            "open_pair",
            "open_profile_pair",
            "open_prompts",
            "open_source",
            "open_sources",
            "require_new",
        ],
        "origin": [
            "SERVERS",
            "command_line",
            "git_sha",
            "provenance",
            "utc_now",
            "version_of",
            "versions",
        ],
        "progress": ["ProgressBar", "Working", "time_left"],
        "prompts": ["PromptSet", "parse_rows"],
        "runtime_table": [
            "ModelCost",
            "NoRoom",
            "Point",
            "PromptPoint",
            "Reader",
            "RulePoint",
            "RuntimeTable",
            "SEVERAL",
            "STORES",
            "Step",
            "StepNoRoom",
            "TIMED_PATH",
            "TableMeasured",
            "Term",
            "Work",
            "load_runtime_table",
            "runtime_file_name",
            "save_runtime_table",
        ],
        "show": [
            "USEFUL_GAP",
            "answer",
            "print_profile",
            "print_profile_json",
            "title",
        ],
        "step_rule": ["StepRule"],
        "terminal": [
            "digits",
            "make_table",
            "percent",
            "print_json",
            "report",
            "result_console",
            "say",
            "say_note",
            "show_table",
        ],
    },
)
