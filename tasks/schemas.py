"""Columns of every table that stages exchange. A change of meaning here raises the writing stage's version.

Ids are 16 hex digits. ``prompt_id`` hashes the normalised conversation; ``sample_id`` hashes (prompt_id, role,
revision, sampling settings, sample index, seed), so a redone shard has identical ids.
"""

import pyarrow as pa

MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])

# One problem to solve.
PROMPT = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("source", pa.string()),  # the task or data set it comes from; results are reported by it
        ("messages", pa.list_(MESSAGE)),  # the conversation up to the model's turn, system prompt included
        ("answer", pa.string()),  # the known final answer, null where unknown
        ("reference", pa.string()),  # a full reference response, null where there is none
        ("verifier", pa.string()),  # name of the check of an answer, see tasks/verify.py
        ("entry", pa.string()),  # JSON that the verifier needs beside the answer, null if nothing
    ]
)

# A row that was refused, with the reason; nothing is thrown away.
QUARANTINE = pa.schema(
    [
        ("source", pa.string()),
        ("position", pa.int64()),  # row or line number in its source, from 0
        ("reason", pa.string()),
        ("raw", pa.string()),  # at most 10,000 characters of the row
    ]
)

# A usable row that no draw took, by its place and with the reason: nothing was asked about it.
UNDRAWN = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("source", pa.string()),
        ("position", pa.int64()),
        ("reason", pa.string()),  # not_a_candidate (it stands in ``prompts``) | not_held_out
    ]
)

# One sampled response.
SAMPLE = pa.schema(
    [
        ("sample_id", pa.string()),
        ("prompt_id", pa.string()),
        ("role", pa.string()),  # teacher, a further teacher's name, mentor | student | base | warmup | final
        ("model", pa.string()),
        ("revision", pa.string()),
        ("sample_index", pa.int32()),
        ("seed", pa.int64()),
        ("prompt_token_ids", pa.list_(pa.int32())),
        ("token_ids", pa.list_(pa.int32())),  # the end-of-sequence token included where one was written
        ("text", pa.string()),  # token_ids decoded without special tokens
        ("finish_reason", pa.string()),  # stop | length
        # Under the sampling model at temperature 1, nats; null if not asked: their sum, and by token.
        ("logprob", pa.float32()),
        ("token_logprobs", pa.list_(pa.float32())),
    ]
)

# What the budget says to one prompt: asked and charged, or not asked, and why.
QUERY = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("queries", pa.int32()),  # charged: one a sample
        ("prompt_tokens", pa.int64()),  # charged, all its samples together
        ("completion_tokens", pa.int64()),
        ("reason", pa.string()),  # answered | no_answer | budget_exhausted
    ]
)

# The sampling model's distributions at every position of a response, where they are asked for: kernels/codec.py.
DISTRIBUTION = pa.schema([("sample_id", pa.string()), ("distributions", pa.binary())])

# The TA's view of one teacher annotation, kept or not, or of the student's text that stands in.
SCORE = pa.schema(
    [
        ("sample_id", pa.string()),
        ("prompt_id", pa.string()),
        ("source", pa.string()),
        ("text", pa.string()),
        ("final_answer", pa.string()),
        ("correct", pa.bool_()),  # null where the answer is unknown
        ("ta_teacher", pa.float32()),  # the TA's confidence in the annotation, 0 to 1; null if its engine died of it
        ("calibrated", pa.float32()),  # the same as a share correct, which then decides; null where not asked for
        ("calibrates", pa.bool_()),  # whether the calibration was fitted on this row; null where not asked for
        ("kept", pa.bool_()),
        # kept | below_threshold | peer_review | empty | truncated | unscored | disagreement | not_chosen | replaced
        # | calibrates;
        # stand_in: a row of the student's text in place of those replaced, the TA's confidence in it stands in SIGNAL
        ("reason", pa.string()),
    ]
)

# What one teacher gave another's annotation.
REVIEW = pa.schema(
    [
        ("sample_id", pa.string()),
        ("prompt_id", pa.string()),
        ("teacher", pa.string()),  # who wrote it
        ("reviewer", pa.string()),
        ("score", pa.float32()),  # confidence that it is right, 0 to 1; null if the reviewer's engine died of it
    ]
)

# What the teacher said to a prompt's auxiliary question, kept or not.
TARGET = pa.schema(
    [
        ("sample_id", pa.string()),
        ("prompt_id", pa.string()),
        ("source", pa.string()),
        ("text", pa.string()),
        ("kept", pa.bool_()),
        ("reason", pa.string()),  # kept | empty | truncated
    ]
)

# One training row: an annotation that was kept, the student's text that stands in, or an auxiliary target.
KEPT = pa.schema(
    [
        ("row_id", pa.string()),
        ("prompt_id", pa.string()),
        ("sample_id", pa.string()),
        ("source", pa.string()),
        ("prompt_token_ids", pa.list_(pa.int32())),
        ("token_ids", pa.list_(pa.int32())),
        ("weight", pa.float32()),
        ("distributions", pa.binary()),  # the teacher's, as in DISTRIBUTION; null where they were not asked for
    ]
)

# A prompt whose annotation was asked and paid for: on-policy rollouts may start from it, also if the row was dropped.
CHARGED = pa.schema([("prompt_id", pa.string()), ("source", pa.string()), ("prompt_token_ids", pa.list_(pa.int32()))])

# All that steered (or did not lead to) a teacher query, one row a candidate prompt.
SIGNAL = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("source", pa.string()),
        ("samples", pa.int32()),
        ("unique_answers", pa.int32()),
        ("majority_share", pa.float32()),
        ("entropy", pa.float32()),  # normalised answer entropy, 0 to 1
        ("majority_answer", pa.string()),
        ("majority_text", pa.string()),
        ("correct", pa.bool_()),  # of the majority answer; null where unknown
        (
            "ta_student",
            pa.float32(),
        ),  # the TA's confidence in the majority answer; null if its engine died of it
        ("uncertainty", pa.float32()),  # rank average, 0 to 1
        ("selected", pa.bool_()),
        # selected | budget_exhausted: behind the ranking's last query | source_cap: before it, behind as many of its
        # source as that may have | balance: its query went to a place guaranteed to another source
        ("reason", pa.string()),
    ]
)

# Training curve, one row an optimiser step; null where a term does not apply.
STEP = pa.schema(
    [
        ("step", pa.int32()),
        ("loss", pa.float32()),  # nats per response token of the global batch
        ("loss_on_policy", pa.float32()),
        ("loss_off_policy", pa.float32()),
        ("validation_loss", pa.float32()),  # the stage's own loss on rows set aside; only at validation steps
        ("learning_rate", pa.float32()),
        ("gradient_norm", pa.float32()),
        ("tokens", pa.int64()),  # response tokens of the step
        ("seconds", pa.float32()),
        ("rollout_seconds", pa.float32()),
        ("intervention_rate", pa.float32()),
        ("response_length", pa.float32()),  # mean tokens of a rollout
        ("eos_rate", pa.float32()),  # share of rollouts that ended by themselves
        ("teacher_tokens", pa.int64()),  # positions the teacher was asked about online
        ("rollouts", pa.int64()),  # sequences rolled out at this step
        ("pooled", pa.int64()),  # sequences of this step that were kept from rollouts: a replay, a collection
        ("phi", pa.float32()),  # DistiLLM's φ at this step
    ]
)

# Rollouts by response position, summed over the stage. Forwards are those of rows while they decode.
POSITION = pa.schema(
    [
        ("position", pa.int32()),
        ("emitted", pa.int64()),
        ("interventions", pa.int64()),
        ("agreeing", pa.int64()),  # interventions whose token was the student's draft as well
        ("cuts", pa.int64()),
        ("student_forwards", pa.int64()),  # that begin at this position
        ("student_covered", pa.int64()),  # that give this position, perhaps among others
        ("teacher_forwards", pa.int64()),
        ("teacher_covered", pa.int64()),
    ]
)

# One evaluated response: SAMPLE's identity with its marks.
EVALUATION = pa.schema(
    [
        ("label", pa.string()),  # base | teacher | warmup | final | promoted
        ("prompt_id", pa.string()),
        ("source", pa.string()),
        ("sample_index", pa.int32()),
        ("seed", pa.int64()),
        ("text", pa.string()),
        ("final_answer", pa.string()),
        ("correct", pa.bool_()),
        ("rouge_l", pa.float32()),  # F1, 0 to 100, the best over references; null without a reference
        ("tokens", pa.int32()),
        ("finish_reason", pa.string()),
    ]
)

# Response loss of the reference under a model, one row a held-out prompt and model.
RESPONSE_LOSS = pa.schema(
    [
        ("label", pa.string()),
        ("prompt_id", pa.string()),
        ("source", pa.string()),
        ("loss", pa.float32()),  # mean nats per reference token
        ("tokens", pa.int32()),
    ]
)
