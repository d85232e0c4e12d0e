"""What the JSON documents hold that people hand on: of a run, an analysis, a benchmark, and how they are checked.

    base.py      what they share, and how they are checked
    run.py       RunRecord: config.json, beside its options; Result: result.json; Costs: cost.json
    log.py       EVENTS: lines of log.jsonl, by event
    analysis.py  Analysis: analysis.json             bench.py  Bench: a benchmark's page, as JSON
    patches.py   Patches: patches.json               demo.py   DemoResults: results.json of a demo

Plans, sensitivities and packed files have readers of their own, in `plan/quant_plan.py`, `measure/table.py` and
`deploy/`.
"""
