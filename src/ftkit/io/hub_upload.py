"""A folder onto the Hugging Face hub."""

from pathlib import Path

from ftkit.errors import ExitCode, UserError


def push_folder(folder: Path, repository: str) -> str:
    """Upload every file as one commit and return its address. A repository that is not there yet is made private.

    The token is huggingface_hub's own: HF_TOKEN, or the one of `hf auth login`. Whatever fails is exit 6.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Merged with ftkit")
    except Exception as error:  # what a network or a hub may raise has no common class
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        hint = f"the merged model is in {folder}; is HF_TOKEN set, and may it write there? The same command tries again"
        raise UserError(f"--push-to-hub {repository}: {reason}", ExitCode.ENVIRONMENT, hint=hint) from None
    return str(commit.commit_url)
