"""What `--help` of the load tester shows beside its options."""

from __future__ import annotations

ABOUT = """\
Load a server that speaks OpenAI's routes, and say how long its users wait.
`oneplusn loadtest URL` sends one load; all of its options: oneplusn loadtest load --help
"""
EXAMPLES = """\
examples:
  oneplusn loadtest http://127.0.0.1:8000 --concurrency 16 --duration 30
      sixteen clients, each sending its next request once it has its answer
  oneplusn loadtest http://127.0.0.1:8000 --rate 5 --popularity zipf:1.1 --out results
      five requests a second on average, some tasks more often than others, report in a folder
  oneplusn loadtest sweep http://127.0.0.1:8000 --over concurrency=1,2,4,8,16 --out growth
      the same load again and again, with more and more clients
  oneplusn loadtest compare before after
      the ratio of every figure of two reports, and whether it could be chance
"""
LOAD_EXAMPLES = """\
examples:
  oneplusn loadtest http://127.0.0.1:8000 --concurrency 16 --duration 30
      sixteen clients, each sending its next request once it has its answer
  oneplusn loadtest http://127.0.0.1:8000 --rate 5 --burstiness 0.5 --popularity zipf:1.1
      five requests a second on average, in bursts, some tasks more often than others
  oneplusn loadtest http://127.0.0.1:8000 --rate 1 --ramp-to 20 --duration 120 \\
      --slo ttft=500ms,itl=50ms --min-goodput 95%
      more and more requests; exit status 3 if fewer than 95 % came as fast as that
  oneplusn loadtest http://127.0.0.1:8000 --concurrency 512 --processes 4 --out results
      more clients than one process can read
  oneplusn loadtest http://127.0.0.1:8000 --concurrency 8 \\
      --churn 0.5 --churn-adapter letters=./letters-1,./letters-2
      replace an adapter every two seconds meanwhile

exit status: 0; 1 if requests or swaps failed; 2 if nothing could be sent; 3 if the goodput is below
--min-goodput, which then decides about failed requests too; 130 if it was interrupted
"""
SWEEP_EXAMPLES = """\
examples:
  oneplusn loadtest sweep http://127.0.0.1:8000 --over concurrency=1,2,4,8,16 --duration 20
      the same load with more and more clients
  oneplusn loadtest sweep http://127.0.0.1:8000 --over tasks=1,4,16 --concurrency 16 \\
      --popularity distinct --out by-tasks
      the same clients on more and more different adapters

exit status: as of a load, the worst of all
"""
COMPARE_EXAMPLES = """\
examples:
  oneplusn loadtest compare before after
      two folders that --out wrote
  oneplusn loadtest compare a.json b.json c.json --out compared
      each of the others beside the first; the requests.jsonl beside each tells what is chance

exit status: 0; 2 if they cannot be compared
"""
