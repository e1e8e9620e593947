#compdef titan
# zsh completion for titan
_titan() {
    local -a found
    local line
    for line in "${(@f)$(_TITAN_COMPLETE=1 titan "${(@)words[2,CURRENT]}" 2>/dev/null)}"; do
        [[ -n "$line" ]] && found+=("${${line%%$'\t'*}//:/\\:}:${line#*$'\t'}")
    done
    if (( ${#found} )); then _describe titan found; else _files; fi
}
compdef _titan titan
