//! Examples at the end of each command's help and manual page. A test parses every one of them.

use clap::Command;

/// Command, and its examples: a line each, with what it does after `#`.
const EXAMPLES: &[(&str, &[&str])] = &[
    (
        "run",
        &[
            "xctl run --rm -it busybox sh                  # a shell, whose container is removed at its end",
            "xctl run -d --name web --network host -v /tmp:/data:ro -e PORT=80 web:1",
            "xctl run -d --restart always --memory 256m --cpus 0.5 --init busybox sleep 1d",
            "xctl run --rm --user 1000:1000 --tmpfs /scratch:size=64m busybox id",
            "xctl run --rm --rootfs /tmp /bin/program      # a folder in the place of an image",
        ],
    ),
    ("create", &["xctl create --name web busybox httpd -f        # `xctl start web` starts it"]),
    ("start", &["xctl start web", "xctl start --attach web                        # with its output and its exit status"]),
    ("exec", &["xctl exec web ls -l /etc", "xctl exec -it web sh", "xctl exec --user 1000 --env A=1 web env"]),
    ("attach", &["xctl attach web", "xctl attach --detach-keys ctrl-x web           # Ctrl-X leaves it running"]),
    ("ps", &["xctl ps", "xctl ps --all", "xctl ps --all --format json"]),
    ("inspect", &["xctl inspect web", "xctl inspect --type image busybox"]),
    ("stop", &["xctl stop web", "xctl stop --time 60 web db                     # a minute before they are killed"]),
    ("kill", &["xctl kill web", "xctl kill --signal HUP web"]),
    ("rm", &["xctl rm web", "xctl rm --force web db                         # also while they run"]),
    ("top", &["xctl top web"]),
    ("stats", &["xctl stats", "xctl stats --every 2 web"]),
    ("logs", &["xctl logs web", "xctl logs --follow --tail 100 web"]),
    ("events", &["xctl events", "xctl events topic==/tasks/exit                 # exits alone"]),
    (
        "pull",
        &[
            "xctl pull busybox                              # docker.io/library/busybox:latest",
            "xctl pull --user me registry.example.com/app:2 # the password comes from XCTL_PASSWORD or standard input",
            "xctl pull --plain-http 10.0.0.1:5000/app:2",
        ],
    ),
    ("push", &["xctl push registry.example.com/app:2", "xctl push app:2 registry.example.com/team/app:2 # under another name"]),
    ("images", &["xctl images", "xctl images --format json"]),
    ("tag", &["xctl tag busybox registry.example.com/tools:1"]),
    ("rmi", &["xctl rmi busybox", "xctl rmi --force busybox                       # although a container was made from it"]),
    (
        "import",
        &[
            "xctl import image.tar                          # of docker save, ctr images export or skopeo",
            "xctl import --as app:2 image.tar",
            "xctl import -                                  # standard input",
        ],
    ),
    ("export", &["xctl export --output image.tar busybox", "xctl export --output - busybox                 # to standard output"]),
    ("cp", &["xctl cp web:/etc/passwd .", "xctl cp /tmp/. web:/data                       # what is in the folder"]),
    ("prune", &["xctl prune", "xctl prune --images --force                    # images without a container, too, and without a question"]),
    ("df", &["xctl df"]),
    (
        "why",
        &[
            "xctl why busybox                              # what keeps the image's index or manifest",
            "xctl why sha256:9f1a2b3c                      # a blob, or the snapshot of a layer, by the beginning of its digest",
        ],
    ),
    ("upgrade", &["xctl upgrade"]),
    ("completion", &["xctl completion bash                           # source <(xctl completion bash)"]),
    ("man", &["xctl man /tmp                                  # then `man /tmp/xctl-run.1`"]),
];

/// Appends the examples to the help of each subcommand.
pub(crate) fn append(mut line: Command) -> Command {
    for (name, examples) in EXAMPLES {
        let mut text = "Examples:".to_owned();
        for example in *examples {
            text.push_str("\n  ");
            text.push_str(example);
        }
        line = line.mut_subcommand(name, |command| command.after_help(text));
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli;

    #[test]
    fn each_command_has_examples_that_can_be_parsed() {
        for command in cli::command().get_subcommands().filter(|command| command.get_name() != "help") {
            let known = EXAMPLES.iter().find(|(name, _)| *name == command.get_name());
            let (name, examples) = known.unwrap_or_else(|| panic!("{} has no examples", command.get_name()));
            assert!(command.clone().render_help().to_string().contains("Examples:\n  xctl "), "{name}");
            for example in *examples {
                let words: Vec<_> = example.split('#').next().unwrap_or_default().split_whitespace().collect();
                assert!(words.starts_with(&["xctl", name]), "{example}");
                if let Err(error) = cli::command().try_get_matches_from(&words) {
                    panic!("{example}: {error}");
                }
            }
        }
    }
}
