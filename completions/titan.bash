# bash completion for titan
_titan_completion() {
    local IFS=$'\n'
    COMPREPLY=( $(_TITAN_COMPLETE=1 titan "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null | cut -f1) )
}
complete -o default -F _titan_completion titan
