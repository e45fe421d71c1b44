{{/* Stops with a sentence for values that the schema allows one by one, but not together. */}}
{{- define "chiasm.validate" -}}
{{- if not (regexMatch "^[a-z]" (include "chiasm.fullname" .)) -}}
{{- fail (printf "names of Services begin with a letter, %s does not; set fullnameOverride" (include "chiasm.fullname" .)) -}}
{{- end -}}
{{- include "chiasm.validatePools" . -}}
{{- include "chiasm.validateSettings" . -}}
{{- include "chiasm.validateModel" . -}}
{{- include "chiasm.validateAccess" . -}}
{{- if and .Values.metrics.serviceMonitor.enabled .Values.metrics.podMonitor.enabled -}}
{{- fail "metrics.serviceMonitor and metrics.podMonitor would scrape every pod twice; enable one of them" -}}
{{- end -}}
{{- if and .Values.tracing.enabled (not .Values.tracing.endpoint) -}}
{{- fail "tracing.enabled needs tracing.endpoint, as http://collector:4317" -}}
{{- end -}}
{{- if and .Values.route.enabled (not .Values.route.parentRefs) -}}
{{- fail "route.enabled needs route.parentRefs" -}}
{{- end -}}
{{- if and .Values.ingress.enabled (not .Values.ingress.hosts) -}}
{{- fail "ingress.enabled needs ingress.hosts" -}}
{{- end -}}
{{- end -}}

{{- define "chiasm.validatePools" -}}
{{- $colocate := .Values.decoder.settings.colocate -}}
{{- if and $colocate (or .Values.expertPools.text.enabled .Values.expertPools.vision.enabled) -}}
{{- fail "decoder.settings.colocate runs both pools inside the decoder; set expertPools.text.enabled and expertPools.vision.enabled to false" -}}
{{- end -}}
{{- if and (not $colocate) (not .Values.expertPools.text.enabled) -}}
{{- fail "without expertPools.text nothing can be answered; enable it, or set decoder.settings.colocate" -}}
{{- end -}}
{{- $types := dict -}}
{{- range $component, $spec := include "chiasm.components" . | fromYaml -}}
{{- $type := include "chiasm.scaling" $spec.values -}}
{{- if ne $component "gateway" -}}{{- $_ := set $types $type $component -}}{{- end -}}
{{- with $spec.values.autoscaling -}}
{{- if and (ne $type "none") (lt (int .maxReplicas) (int .minReplicas)) -}}
{{- fail (printf "%s: autoscaling.maxReplicas is less than autoscaling.minReplicas" $component) -}}
{{- end -}}
{{- if and (eq $type "hpa") (lt (int .minReplicas) 1) -}}
{{- fail (printf "%s: an HPA cannot scale to 0; use autoscaling.type builtin or keda-external" $component) -}}
{{- end -}}
{{- end -}}
{{- with $spec.shards -}}
{{- $most := int (dig "settings" "max_shards" 0 $spec.values) -}}
{{- $least := int $spec.values.replicas -}}
{{- if ne $type "none" -}}{{- $least = int $spec.values.autoscaling.minReplicas -}}{{- end -}}
{{- if and (gt $most 0) (gt $least 0) (lt (mul $most $least) (int .)) -}}
{{- fail (printf "%s: %d pods with at most %d shards each cannot hold all %d shards" $component $least $most (int .)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- range $other := list "keda-external" "hpa" -}}
{{- if and (hasKey $types "builtin") (hasKey $types $other) -}}
{{- fail (printf "%s has autoscaling.type builtin and %s %s: the orchestrator scales all pools or none" (get $types "builtin") (get $types $other) $other) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Settings that a process would refuse, or that would fail at the first long prompt. */}}
{{- define "chiasm.validateSettings" -}}
{{- $decoder := .Values.decoder.settings -}}
{{- $step := int (default 512 $decoder.max_step_tokens) -}}
{{- $running := int (default 32 $decoder.max_running) -}}
{{- if le $step $running -}}
{{- fail (printf "decoder.settings.max_step_tokens, %d, must be more than decoder.settings.max_running, %d" $step $running) -}}
{{- end -}}
{{- range $modality, $pool := .Values.expertPools -}}
{{- $most := int (default 4096 $pool.settings.max_dispatch_tokens) -}}
{{- if and $pool.enabled (gt $step $most) -}}
{{- fail (printf "decoder.settings.max_step_tokens, %d, is more than expertPools.%s.settings.max_dispatch_tokens, %d" $step $modality $most) -}}
{{- end -}}
{{- end -}}
{{- $scaling := .Values.orchestrator.settings -}}
{{- if ge (float64 (dig "scale_down_at" 0.4 $scaling)) (float64 (dig "scale_up_at" 0.8 $scaling)) -}}
{{- fail "orchestrator.settings.scale_down_at must lie below orchestrator.settings.scale_up_at" -}}
{{- end -}}
{{- end -}}

{{- define "chiasm.validateModel" -}}
{{- $volume := .Values.model.volume -}}
{{- $download := .Values.model.download -}}
{{- if and (eq $volume.type "existingClaim") (not $volume.existingClaim) -}}
{{- fail "model.volume.type existingClaim needs model.volume.existingClaim" -}}
{{- end -}}
{{- if and (eq $download.source "none") (ne $volume.type "existingClaim") -}}
{{- fail (printf "model.volume.type %s is empty at first; set model.download.source, or give an existingClaim that holds the model" $volume.type) -}}
{{- end -}}
{{- if and (eq $download.source "none") $download.checksums -}}
{{- fail "model.download.checksums are compared after a download; with source none nothing is downloaded" -}}
{{- end -}}
{{- if and (eq $download.source "huggingface") (not $download.huggingface.repository) -}}
{{- fail "model.download.source huggingface needs model.download.huggingface.repository" -}}
{{- end -}}
{{- $isPinned := or $download.checksums (regexMatch "^[0-9a-f]{40}$" $download.huggingface.revision) -}}
{{- if and (eq $download.source "huggingface") (eq $volume.type "emptyDir") (not $isPinned) -}}
{{- fail (printf "with model.volume.type emptyDir every pod downloads by itself, and %s may be another model by then; give a commit as model.download.huggingface.revision, or model.download.checksums, or share a volume" $download.huggingface.revision) -}}
{{- end -}}
{{- if and (eq $download.source "archive") (not $download.archive.url) -}}
{{- fail "model.download.source archive needs model.download.archive.url" -}}
{{- end -}}
{{- if and (eq $download.source "command") (not $download.command) -}}
{{- fail "model.download.source command needs model.download.command" -}}
{{- end -}}
{{- end -}}

{{- define "chiasm.validateAccess" -}}
{{- $auth := .Values.auth -}}
{{- $tests := .Values.tests -}}
{{- $gateway := .Values.tls.gateway -}}
{{- if $auth.enabled -}}
{{- if and (not $auth.keys) (not $auth.existingSecret) -}}
{{- fail "auth.enabled needs auth.existingSecret or auth.keys" -}}
{{- end -}}
{{- if and $auth.keys $auth.existingSecret -}}
{{- fail "give auth.keys or auth.existingSecret, not both" -}}
{{- end -}}
{{- if and $auth.existingSecret $tests.enabled (not (and $tests.apiKeySecret.name $tests.apiKeySecret.key)) -}}
{{- fail "with auth.existingSecret the tests need a key: set tests.apiKeySecret.name and .key, or tests.enabled to false" -}}
{{- end -}}
{{- end -}}
{{- if and $gateway.existingSecret $gateway.certManager.issuerRef -}}
{{- fail "give tls.gateway.existingSecret or tls.gateway.certManager.issuerRef, not both" -}}
{{- end -}}
{{- if and $gateway.certManager.issuerRef (not $gateway.certManager.dnsNames) -}}
{{- fail "tls.gateway.certManager.issuerRef needs tls.gateway.certManager.dnsNames" -}}
{{- end -}}
{{- if and $gateway.existingSecret $tests.enabled (not $tests.tlsName) -}}
{{- fail "with tls.gateway.existingSecret the tests need the name in its certificate: set tests.tlsName, and tests.caKey, or tests.enabled to false" -}}
{{- end -}}
{{- if $gateway.clientCASecret -}}
{{- if not (include "chiasm.hasTls" (dict "root" . "component" "gateway")) -}}
{{- fail "tls.gateway.clientCASecret needs a certificate of the gateway: set tls.enabled, or one under tls.gateway" -}}
{{- end -}}
{{- if and $tests.enabled (not $tests.clientCertSecret) -}}
{{- fail "with tls.gateway.clientCASecret the tests need a certificate: set tests.clientCertSecret, or tests.enabled to false" -}}
{{- end -}}
{{- end -}}
{{- $accounts := .Values.serviceAccount -}}
{{- if and (not $accounts.create) (eq $accounts.name $accounts.orchestratorName) -}}
{{- fail "serviceAccount.orchestratorName must differ from serviceAccount.name: every pod would get the orchestrator's rights" -}}
{{- end -}}
{{- end -}}
